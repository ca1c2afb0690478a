"""Commands run by other users of this machine, which tests that root runs can be."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from commands import ROOT

GROUP = 40100  # of both users, beside a group of their own


#: Runs one command after the other, and prints code and output of each.
_EACH = "import commands, json, sys; print(json.dumps([commands.call(*words) for words in json.loads(sys.argv[1])]))"


def call_as(user: int, umask: int, home: Path, *commands) -> list[tuple[int, str]]:
    """Run ``liftdist`` commands, each a list of words, one after the other: exit code and output of each."""
    given = json.dumps([[str(word) for word in words] for words in commands])
    run = run_as(user, umask, home, sys.executable, "-c", _EACH, given)
    assert run.returncode == 0, run.stdout
    answers = [(code, said) for code, said in json.loads(run.stdout.splitlines()[-1])]
    ranks = "\n".join(run.stdout.splitlines()[:-1])  # what they print goes past this process
    return [(code, said or ranks) for code, said in answers]


def run_as(user: int, umask: int, home: Path, *command, prepare: str = "true") -> subprocess.CompletedProcess[str]:
    """Run a command as user and member of ``GROUP``; returns it finished, with its output and its errors as one text.

    Args:
        prepare: a command that root runs before, in the mount namespace of the command.
    """
    identity = ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={GROUP},{user}", "--"]
    script = [
        *_opened(),
        prepare,
        f"umask {umask:o}",
        f"cd {shlex.quote(str(home))}",
        shlex.join(["exec", *identity, *map(str, command)]),
    ]
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HOME": str(home), "HF_HOME": str(home / "hf"),
        "USER": f"user{user}", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", "\n".join(script)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip


def why_not() -> str | None:
    """Why no command can be run as another user here."""
    if os.geteuid():
        return "needs root, to run commands as other users"
    tried = run_as(40001, 0o022, Path("/"), sys.executable, "-c", "import liftdist, torch")
    return f"needs mount namespaces: {tried.stdout.strip()}" if tried.returncode else None


def _opened() -> list[str]:
    """Commands that show this Python and this checkout where they lie, in folders that others may not enter.

    Seen by the command alone: each such folder is covered by an empty one, with only what is needed in it.
    """
    needed = {}
    for path in (Path(sys.base_prefix), Path(sys.prefix), ROOT):
        if closed := [parent for parent in [*path.parents][::-1] if not parent.stat().st_mode & 0o001]:
            needed[path] = closed[0]
    lines = ["mount -t tmpfs -o mode=755 tmpfs /mnt"] if needed else []
    for number, path in enumerate(needed):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}" for closed in sorted(set(needed.values()))]
    for number, path in enumerate(needed):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind /mnt/{number} {shlex.quote(str(path))}"]
    return lines


def copy_as_it_is(source: Path, target: Path) -> None:
    """Copy a folder with its owners, groups and permissions."""
    subprocess.run(["cp", "-a", source, target], check=True)
