"""Nodes find each other before ranks start, as processes over real sockets; strangers are heard of nowhere, and delay nobody."""

import contextlib
import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from commands import ROOT

from liftdist import failures, network
from liftdist.cluster import health, rollcall
from liftdist.errors import UserError

SECRET = "of this start"
NODES = ["n0", "n1", "n2"]


class Job:
    """A job whose nodes are processes of this machine."""

    def __init__(self, folder):
        self.logs = folder
        self.port = network.free_port(os.getpid())

    def check(self, number, secret=SECRET, nodes=NODES):
        """Start the check of one node."""
        environment = {
            **os.environ,
            "SLURM_NODEID": str(number),
            "SLURMD_NODENAME": nodes[number],
            "LIFTDIST_NODES": " ".join(nodes),
            "LIFTDIST_LOGS": str(self.logs),
            "LIFTDIST_HEAD": f"127.0.0.1:{self.port}",
            "LIFTDIST_SECRET": secret,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "liftdist.cluster.job", "check"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def connect(self, address="127.0.0.1"):
        """A connection to the head, as soon as it listens."""
        began = time.monotonic()
        while True:
            try:
                return socket.create_connection((address, self.port), timeout=20)
            except ConnectionRefusedError:
                assert time.monotonic() - began < 60
                time.sleep(0.05)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def facts(node, **changed):
    return health.facts_of(node, ROOT) | changed


def signed(report, secret):
    """A line as a node that has ``secret`` would send it."""
    text = report if isinstance(report, bytes) else json.dumps(report).encode()
    return hmac.new(secret.encode(), b"report " + text, hashlib.sha256).hexdigest().encode() + b" " + text + b"\n"


def ended(process, seconds=60):
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def test_nodes_that_are_fit_are_told_so(job):
    nodes = [job.check(number) for number in range(3)]
    assert [ended(node) for node in nodes] == [(0, "")] * 3
    assert list(job.logs.iterdir()) == []


STRANGERS = {
    "forged": json.dumps(facts("n1", python="3.0", problem="all is lost")).encode() + b"\n",
    "forged with a code": signed(facts("n1", torch="0.1"), "a guess"),
    "of another start": signed(facts("n1", torch="0.1"), "of the start before"),
    "without keys": b'{"node": "n1"}\n',
    "signed by its own code": signed(b"{}", "") + b"\n",
    "garbage": os.urandom(4000) + b"\n",
    "no text": b"\xff\xfe\x00 \n\n\n",
    "too long": b"x" * 1_000_000,
    "nothing": b"",
    "half a line": b'{"node": ',
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_not_believed_and_delay_nobody(said, job):
    """Each stays connected, many times over, before a node says a word."""
    head = job.check(0)
    with contextlib.ExitStack() as strangers:
        for _ in range(20):
            stranger = strangers.enter_context(job.connect())
            with contextlib.suppress(OSError):  # the head may hang up on what is too long
                stranger.sendall(said)
        began = time.monotonic()
        for name in NODES[1:]:
            rollcall.report(facts(name), SECRET, "127.0.0.1", job.port, 20)
        assert time.monotonic() - began < rollcall.PATIENCE / 2  # one of them alone held it up for so long
        assert ended(head) == (0, "")
    assert list(job.logs.iterdir()) == []


def test_a_real_node_is_heard_after_one_that_pretended_to_be_it(job):
    head = job.check(0, nodes=NODES[:2])
    with job.connect() as stranger:
        stranger.sendall(signed(facts("n1", torch="0.1"), "of the start before"))
        assert stranger.recv(100) == b""  # no word to who does not belong here
    rollcall.report(facts("n1", torch="0.1"), SECRET, "127.0.0.1", job.port, 20)
    code, said = ended(head)
    assert code == 2
    assert said.startswith("liftdist: n1 has torch 0.1, but n0 has ")
    (found,) = failures.read(job.logs)
    assert (found.kind, found.error) == (failures.USER_ERROR, said.removeprefix("liftdist: ").strip())


def test_a_node_of_another_version_is_named(job):
    head = job.check(0, nodes=NODES[:2])
    rollcall.report({"node": "n1"}, SECRET, "127.0.0.1", job.port, 60)
    code, said = ended(head)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("liftdist: n1 has python unknown, but n0 has ")


def test_a_node_that_does_not_see_the_run_directory_says_so(job):
    head = job.check(0, nodes=NODES[:2])
    rollcall.report(facts("n1", problem="does not see it"), SECRET, "127.0.0.1", job.port, 60)
    assert ended(head) == (2, "liftdist: n1: does not see it\n")


def test_the_head_listens_at_its_own_address_alone(job):
    head = job.check(0, nodes=NODES[:2])
    job.connect().close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", job.port), timeout=5)
    rollcall.report(facts("n1"), SECRET, "127.0.0.1", job.port, 20)
    assert ended(head) == (0, "")


def test_what_comes_late_is_not_heard(job):
    """The time is up although somebody keeps talking."""
    talking = threading.Event()

    def talk():
        with contextlib.suppress(OSError), job.connect() as stranger:
            while not talking.wait(0.05):
                stranger.sendall(b"x")

    talker = threading.Thread(target=talk)
    talker.start()
    began = time.monotonic()
    heard = rollcall.hear(NODES[1:], SECRET, "127.0.0.1", job.port, 1.5)
    took = time.monotonic() - began
    talking.set()
    talker.join()
    assert heard == {}
    assert 1.5 <= took < 4
    with pytest.raises(UserError, match=f"n1: cannot reach the head, 127.0.0.1 port {job.port}: Connection refused"):
        rollcall.report(facts("n1"), SECRET, "127.0.0.1", job.port, 0.5)


def test_a_node_believes_no_other_head(job):
    """Whoever listens at the head's address without the secret."""
    with socket.create_server(("127.0.0.1", job.port)) as server:

        def pretend():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(10_000)
                    connection.sendall(b"0" * 64)
                    connection.close()

        threading.Thread(target=pretend, daemon=True).start()
        with pytest.raises(UserError, match="what listens there is not the head of this job"):
            rollcall.report(facts("n1"), SECRET, "127.0.0.1", job.port, 1)
        server.shutdown(socket.SHUT_RDWR)


def test_a_port_that_is_taken_is_no_mistake_of_the_user(job):
    """The next start of the job takes another."""
    with socket.create_server(("127.0.0.1", job.port)):
        code, said = ended(job.check(0))
    assert code == 1
    assert "address already in use" in said
    (found,) = failures.read(job.logs)
    assert found.kind == failures.BUG
    assert found.error.startswith("the nodes cannot be checked: ")


def test_a_batch_script_of_an_older_version_checks_nothing(job):
    code, said = ended(job.check(0, secret=""))
    assert (code, said.count("\n")) == (0, 1)
    assert "nodes are not checked before ranks start" in said
