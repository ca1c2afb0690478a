"""Ranks as the launcher starts them: several nodes by hand, restarts, ranks that fail, addresses and ports."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from test_data import write_records
from test_signals import files_of, run_once, write_config

from liftdist import config as configs
from liftdist import failures, network
from liftdist.errors import UserError
from liftdist.failures import Failure

INJECT = Path(__file__).parent / "inject"


def start(config, *options, overrides=(), fault="", **variables):
    """Start ``liftdist train``."""
    return subprocess.Popen(
        [sys.executable, "-m", "liftdist.cli", "train", str(config), *overrides, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(INJECT), "FAULT": fault, **variables},
    )


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"), steps=12)


def on_one_machine(mesh, config, *overrides):
    return run_once(mesh, *configs.load(config, overrides))


def free_endpoint(address):
    return f"[{address}]:{network.free_port(os.getpid())}" if ":" in address else f"{address}:{network.free_port(7)}"


def test_two_nodes_by_hand_do_what_two_ranks_of_one_do(config, tmp_path):
    """Over IPv6; and a second head at the same port is refused while the first runs."""
    head = free_endpoint("::1")
    nodes = [start(config, "--nnodes", "2", "--node-rank", str(i), "--head", head, "--nproc", "1") for i in (1, 0)]
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "12 steps of 6 sequences on 2 ranks" in "".join(said)
    apart = files_of(tmp_path / "run")
    assert set(ranks.run(2, on_one_machine, config, f"run_dir={tmp_path}/one")) == {"finished"}
    assert files_of(tmp_path / "one") == apart
    (logs,) = (tmp_path / "run" / "logs").iterdir()
    assert {path.name for path in logs.iterdir()} >= {"node-00000.json", "node-00001.json", "rank-00001.log"}
    assert json.loads((logs / "node-00001.json").read_text())["code"] == 0


@pytest.mark.parametrize(
    ("kind", "restarts", "expected"),
    [
        ("bug", 0, r"rank 1 on \S+ failed first: ZeroDivisionError: a bug in this rank\nTraceback"),
        ("kill", 1, r"rank 1 on \S+ failed first: killed by SIGKILL, as the kernel does when memory runs out"),
        pytest.param("exit", 0, r"rank 1 on \S+ failed first: SystemExit: 0", marks=pytest.mark.slow),
        pytest.param(
            "leave",
            0,
            r"rank 1 ended without a word before the run did; rank 0 on \S+ noticed first: \w+",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_summary_names_the_rank_that_failed_first(kind, restarts, expected, config, tmp_path):
    job = start(config, "--nproc", "2", "--max-restarts", str(restarts), fault=f"1:7:{kind}")
    said = job.communicate(timeout=150)[0]
    assert job.returncode == 1
    assert re.search(rf"liftdist: {expected}", said), said
    assert said.count("Traceback (most recent call last)") <= 1
    assert "exitcode" not in said  # torchrun's own report
    assert said.count("continuing after step 5") == restarts  # a restart really goes on, and fails again there
    assert said.count("ended by an error; the same command goes on") == 1
    assert files_of(tmp_path / "run")[0] == 5  # what was committed is there


def test_the_first_failure_is_no_teardown():
    lost = Failure(0, 4, "a", 1.0, "RuntimeError: Connection closed by peer", "trace", failures.LOST_PEERS)
    bug = Failure(2, 4, "b", 2.0, "KeyError: 'x'", "Traceback", failures.BUG)
    late = Failure(1, 4, "a", 3.0, "KeyError: 'y'", "Traceback", failures.BUG)
    ordered = sorted([lost, late, bug], key=lambda failure: (failure.kind, failure.time))
    assert failures.summary(ordered).startswith("rank 2 on b failed first: KeyError: 'x'")
    assert failures.summary([lost]).startswith("ranks 1, 2, 3 ended without a word")
    assert failures.summary([]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node7", ("node7", 29400)),
        ("node7.cluster:123", ("node7.cluster", 123)),
        ("10.0.0.1:29500", ("10.0.0.1", 29500)),
        ("[fe80::1%eth0]:29500", ("fe80::1%eth0", 29500)),
        ("::1", ("::1", 29400)),
    ],
)
def test_endpoints(text, expected):
    assert network.split_endpoint(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-x", "a b", "node:0", "node:70000", "node:x", "$(x):1", "a\nb", "[::1", "node:1:2x"]
)
def test_endpoints_that_are_none(text):
    with pytest.raises(UserError, match="must be HOST"):
        network.split_endpoint(text)


def test_addresses_and_ports():
    with pytest.raises(UserError, match="cannot resolve it"):
        network.resolve("no-such-host.invalid")
    assert network.outgoing_address("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("::1") == "lo"
    assert network.interface_of("203.0.113.9") is None
    port = network.free_port(3)
    with socket.create_server(("", port)):
        assert network.free_port(3) != port
        with pytest.raises(UserError, match=f"port {port} on .*: Address already in use"):
            network.check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="is no address of this machine"):
        network.check_port("203.0.113.9", port)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --head"),
        (["--nnodes", "2", "--node-rank", "2", "--head", "h"], "--node-rank 2: must be below --nnodes 2"),
        (["--nnodes", "0"], "--nnodes must be at least 1, got 0"),
        (["--nnodes", "2", "--head", "no-such-host.invalid"], "cannot resolve it"),
        (["--nnodes", "2", "--node-rank", "0", "--head", "203.0.113.9"], "is no address of this machine"),
        (["--max-restarts", "-1"], "--max-restarts must be at least 0, got -1"),
    ],
)
def test_places_that_cannot_be(options, problem, config):
    command = [Path(__file__).parent.parent / "launch" / "torchrun", *options, config]
    environment = {**os.environ, "LIFTDIST_PYTHON": sys.executable}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("liftdist: ")
    assert problem in run.stderr
    assert run.stderr.count("\n") == 1
