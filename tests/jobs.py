"""Runs of several processes that are under way: what they print, which they are, whether they live."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

HANGS = 60  # seconds after which what takes a few has hung, on a busy machine too


def read_until(process, text, limit=2 * HANGS):
    """Read a job's output up to a line with ``text``; a job that does not come to print it is killed."""
    seen = []
    timer = threading.Timer(limit, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            seen.append(line)
            if text in line:
                return "".join(seen)
    finally:
        timer.cancel()
    raise AssertionError("".join(seen))


def ranks_of(config):
    """Processes of a job by rank."""
    found = {}
    for folder in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if b"liftdist.train" in words and str(config).encode() in words and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    return found


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def tokenisers_of(pid):
    """The processes by which a process tokenises: the one that oversees them, and its workers."""
    overseers = [
        child for child in children(pid) if b"liftdist.data.workers" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return overseers, [worker for overseer in overseers for worker in children(overseer)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < HANGS
        time.sleep(0.02)


def command(config, *words, **options):
    """Start ``liftdist train`` with two ranks, in a session of its own, as a terminal does."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | options.pop("environment", {})
    return subprocess.Popen(
        [sys.executable, "-m", "liftdist", "train", str(config), "--nproc", "2", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=variables,
        **options,
    )
