"""Real vLLM servers, by the command that LIFTDIST_TEST_VLLM names."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest


def command():
    """The ``vllm`` command; skips the test without one."""
    return os.environ.get("LIFTDIST_TEST_VLLM") or pytest.skip("LIFTDIST_TEST_VLLM does not name the vllm command")


@contextmanager
def started(words, log, after=(), **variables):
    """Start a server with ``words``, its port, and the words ``after``; yields its address and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*map(str, words), "--port", str(port), *map(str, after)]
    inherited = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as out:
        process = subprocess.Popen(
            words,
            env={"VLLM_CPU_KVCACHE_SPACE": "1"} | inherited | variables,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except (OSError, urllib.error.URLError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
