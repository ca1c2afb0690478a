"""Commands of SLURM that fail, by wrappers first on PATH, and what becomes of jobs meanwhile."""

import os
import shlex
import shutil
import subprocess
import time

from liftdist.cluster import commands


def wrap(folder, command, code, times=1):
    real = shutil.which(
        command, path=os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if "faulty" not in p)
    )
    script = folder / command
    calls = shlex.quote(f"{script}.calls")
    script.write_text(
        f'#!/bin/bash\nreal={real}\necho "$*" >>{calls}\n[[ $(wc -l <{calls}) -gt {times} ]] || {{ {code}\n}}\nexec $real "$@"\n'
    )
    script.chmod(0o755)


def failing(text):
    return f"echo {shlex.quote(text)} >&2; exit 1"


def state_of(id):
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={id}", "--format=%T"],
        capture_output=True, text=True, check=False, env=commands.clean({**os.environ, "PATH": real_path()}),
    )  # fmt: skip
    return done.stdout.split()


def real_path():
    return os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if "faulty" not in part)


def wait_for_state(id, *states, seconds=60):
    ends = time.monotonic() + seconds
    while not set(now := state_of(id)) <= set(states) or not now:
        assert time.monotonic() < ends, now
        time.sleep(0.1)


def wait_for_text(path, text, seconds=120):
    ends = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < ends, path.read_text() if path.exists() else path
        time.sleep(0.2)
