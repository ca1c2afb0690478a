"""Signals that are sent, and terminals that are closed, at any moment of a run."""

import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
from commands import ROOT, write_job_config
from jobs import children, command, is_alive, ranks_of, read_until, wait_until

from liftdist import network


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_job_config(
        tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), save_every=0, steps=10**6
    )


def processes_of(config):
    """All processes of a run."""
    shown = subprocess.run(["pgrep", "-f", str(config)], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in shown.split() if int(pid) != os.getpid()]


def in_terminal(config):
    """Start a run of two ranks in a terminal of its own; the process, and the other side of the terminal."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.execv(sys.executable, [sys.executable, "-m", "liftdist", "train", str(config), "--nproc", "2"])
    return pid, master


def watch(master, seconds, until=b"\0"):
    """Read from a terminal for some time, or until a text appears."""
    seen, ends = b"", time.monotonic() + seconds
    while until not in seen and (left := ends - time.monotonic()) > 0:
        if select.select([master], [], [], left)[0]:
            seen += os.read(master, 65536)
    return seen


def close_at(config, seconds, until=b"\0"):
    """Close the terminal of a run at some moment; the newest step that was shown, and the exit code."""
    pid, master = in_terminal(config)
    try:
        wait_until(lambda: is_heard(pid, signal.SIGHUP))
        seen = watch(master, seconds, until)
    finally:
        os.close(master)
    began, ended = time.monotonic(), 0
    while not ended:
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    shown = [int(number) for number in re.findall(rb"training (\d+)/", seen)]
    return max(shown, default=0), os.waitstatus_to_exitcode(status)


def check_closed(config, tmp_path, seconds, until=b"\0"):
    step, code = close_at(config, seconds, until)
    wait_until(lambda: not processes_of(config))
    saved, _ = builders.files_of(tmp_path / "run")
    assert code == 75
    assert saved >= step


def test_a_terminal_that_is_closed_stops_a_run_and_loses_nothing(config, tmp_path):
    check_closed(config, tmp_path, 60, b"training 2/")
    assert builders.files_of(tmp_path / "run")[0] > 0
    check_closed(config, tmp_path, 0)


@pytest.mark.slow
def test_terminals_that_are_closed_at_random_moments(config, tmp_path):
    moments = random.Random(0)
    for _ in range(20):
        check_closed(config, tmp_path, moments.uniform(0, 12))


def test_ignored_signals_stay_ignored_and_others_are_heard_by_every_process(config, tmp_path):
    """As after ``nohup ... &`` in a script; and a service manager ends the job by two signals to all processes."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    job = command(config, preexec_fn=ignore)
    read_until(job, "training 2/")
    assert len(processes_of(config)) == 4  # the command, torchrun, two ranks
    check_loaded(job.pid, config)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGHUP, signal.SIGINT):
        for pid in processes_of(config):
            os.kill(pid, number)
    said = read_until(job, "training ") + read_until(job, "training ")
    assert "stopped" not in said
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        for pid in processes_of(config):
            os.kill(pid, number)
    rest = job.communicate(timeout=60)[0]
    assert job.returncode == 75, rest
    assert "liftdist: stopped (SIGTERM); the same command continues" in rest
    assert builders.files_of(tmp_path / "run")[0] >= 2
    assert not processes_of(config)


def check_loaded(launcher, config):
    """Which libraries the processes of a run have loaded: what none of them uses makes every start slower."""
    (torchrun,) = children(launcher)
    assert not is_loaded(launcher, "torch", "tokenizers", "pyarrow")
    assert is_loaded(torchrun, "torch")
    assert not is_loaded(torchrun, "tokenizers", "pyarrow")  # the first of which transformers would bring
    for rank in ranks_of(config).values():
        assert all(is_loaded(rank, name) for name in ("torch", "tokenizers", "pyarrow"))
        assert not is_loaded(rank, "xxhash")  # which datasets would bring


def is_loaded(pid, *packages):
    """Whether a process has mapped the compiled code of any of these packages."""
    return any(f"-packages/{name}/" in Path(f"/proc/{pid}/maps").read_text() for name in packages)


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        *[("before ranks", name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")],
        ("waiting for another node", "SIGINT"),
        pytest.param("waiting for another node", "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_there_are_ranks_ends_at_once(phase, name, config, tmp_path):
    head = f"127.0.0.1:{network.free_port(os.getpid())}"
    options = ["--nnodes", "2", "--node-rank", "0", "--head", head] if phase == "waiting for another node" else []
    job = command(config, *options, "run_dir=" + str(tmp_path / name))
    if options:
        wait_until(lambda: list((tmp_path / name).glob("logs/*/node-00000.torchrun.log")))
        time.sleep(0.5)
    else:
        wait_until(lambda: is_heard(job.pid, signal.SIGUSR2))  # the last to get a handler
    began = time.monotonic()
    job.send_signal(signal.Signals[name])
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75, said
    assert said.endswith(f"liftdist: stopped ({name}) before training began; the same command starts it\n")
    assert "Traceback" not in said
    assert time.monotonic() - began < 10
    assert not processes_of(config)


def is_heard(pid, number):
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return int(caught, 16) >> (number - 1) & 1


def test_a_signal_to_ranks_that_have_just_begun_waits_for_them(config, tmp_path):
    """It comes before Python runs the first line of a rank; the first one is also that of a namespace, whose default is to
    ignore signals."""
    job = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "liftdist", "train", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    wait_until(lambda: ranks_of(config))
    (rank,) = ranks_of(config).values()
    launcher = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
    os.kill(launcher, signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75, said
    assert "stopped (SIGTERM)" in said
    assert not is_alive(rank)
