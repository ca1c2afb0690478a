"""Streams that fail, block or lack characters: what is printed into them neither ends nor delays the process that prints."""

import contextlib
import fcntl
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT

PRINT_MUCH = """
import sys
from liftdist import output
output.take_over()
for number in range(4000):
    stream = (sys.stdout, sys.stderr)[number % 2]
    print("a line with an umlaut, \\u00fc, and half of a surrogate, \\udc80 \\ud800", number, file=stream)
open("done", "w").close()
"""
COMMAND = [sys.executable, "-m", "liftdist"]


def run(command, cwd, stream, **options):
    """Run a command that prints into ``stream``; its exit code, and how many seconds it took."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=stream, stderr=stream, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options
    )
    return process.wait(60), time.monotonic() - began


def pipe_without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def pipe_that_nobody_reads(blocking=True):
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, blocking)
    return writing


def socket_whose_peer_has_gone():
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def terminal_that_was_closed():
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


def terminal_that_is_stopped():
    _, terminal = pty.openpty()  # whose other side nobody reads, as after Ctrl-S
    return terminal


STREAMS = {
    "a pipe without a reader": pipe_without_reader,
    "a pipe that nobody reads": pipe_that_nobody_reads,
    "a non-blocking pipe that nobody reads": lambda: pipe_that_nobody_reads(blocking=False),
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "a file that is open for reading": lambda: os.open("/dev/null", os.O_RDONLY),
    "a socket whose peer has gone": socket_whose_peer_has_gone,
    "a terminal that was closed": terminal_that_was_closed,
    "a terminal that is stopped": terminal_that_is_stopped,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_fails_or_blocks(kind, tmp_path):
    code, seconds = run([sys.executable, "-c", PRINT_MUCH], tmp_path, STREAMS[kind]())
    assert (tmp_path / "done").exists()
    assert code == 0
    assert seconds < 30  # at the end of the process it waits for two seconds


def test_streams_that_the_caller_closed(tmp_path):
    """The next file that is opened must not become standard output."""
    code = f"{PRINT_MUCH}\nimport os; assert os.open('file', os.O_CREAT) > 2"
    command = f"exec {sys.executable} -c '{code.replace(chr(39), chr(34))}' <&- >&- 2>&-"
    assert run(["bash", "-c", command], tmp_path, None)[0] == 0
    assert (tmp_path / "done").exists()


def test_text_arrives_whole_and_a_gap_is_marked(tmp_path):
    with (tmp_path / "output").open("wb") as file:
        run([sys.executable, "-c", PRINT_MUCH], tmp_path, file)
    written = (tmp_path / "output").read_bytes()
    assert written.count(b"\n") == 4000
    assert "umlaut, ü, ".encode() in written
    reading, writing = os.pipe()
    slow = subprocess.Popen(
        [sys.executable, "-c", PRINT_MUCH.replace("4000", "60000")],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=writing, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writing)
    time.sleep(1.5)  # by now more than a mebibyte waits
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    assert slow.wait(30) == 0
    assert b"bytes are missing here: nobody was reading" in text
    assert text.endswith(b"59999\n")


@pytest.mark.parametrize("words", [["settings"], ["--help"], ["train", "--help"], ["nonsense"], ["settings", "data"]])
def test_a_reader_that_leaves_early_sees_no_traceback(words, tmp_path):
    command = " ".join([*COMMAND, *words])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {{ {command}; echo $? >code; }} 2>&1 | head -n 1"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert (tmp_path / "code").read_text().strip() == ("2" if words == ["nonsense"] else "0")


def test_a_result_that_was_not_written_is_an_error(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "settings"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "liftdist: the output is not complete: No space left on device\n"


def test_a_slow_reader_of_a_result_gets_all_of_it():
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} settings | (sleep 2; wc -l)"], cwd=ROOT, capture_output=True, text=True
    )
    whole = subprocess.run([*COMMAND, "settings"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(done.stdout) == whole.count("\n") > 100


def test_a_job_in_the_background_prints_on_a_terminal_that_forbids_it(tmp_path):
    """``stty tostop`` stops such jobs, unless they ignore the signal."""
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        script = f"set -m; stty tostop; {sys.executable} -c '{PRINT_MUCH.replace('4000', '9')}' & wait; exit $?"
        os.execvp("bash", ["bash", "-c", script])
    with contextlib.suppress(OSError):
        while os.read(master, 4096):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "done").exists()
