"""Ranks as the launcher starts them: several nodes by hand, restarts, and ranks that fail."""

import json
import os
import re
import subprocess
import sys

import builders
import pytest
import ranks
from commands import INJECT, ROOT, write_job_config

from liftdist import config as configs
from liftdist import network


def start(config, *options, overrides=(), fault="", **variables):
    """Start ``liftdist train``."""
    return subprocess.Popen(
        [sys.executable, "-m", "liftdist", "train", str(config), *overrides, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(INJECT), "FAULT": fault, **variables},
    )


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), steps=12)


def on_one_machine(mesh, config, *overrides):
    return builders.run_once(mesh, *configs.load(config, overrides))


def free_endpoint(address):
    return f"[{address}]:{network.free_port(os.getpid())}" if ":" in address else f"{address}:{network.free_port(7)}"


def test_two_nodes_by_hand_do_what_two_ranks_of_one_do(config, tmp_path):
    """Over IPv6; and a second head at the same port is refused while the first runs."""
    head = free_endpoint("::1")
    nodes = [start(config, "--nnodes", "2", "--node-rank", str(i), "--head", head, "--nproc", "1") for i in (1, 0)]
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "12 steps of 6 sequences on 2 ranks" in "".join(said)
    apart = builders.files_of(tmp_path / "run")
    assert set(ranks.run(2, on_one_machine, config, f"run_dir={tmp_path}/one")) == {"finished"}
    assert builders.files_of(tmp_path / "one") == apart
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
            r"rank 1 ended without a message before the run did; rank 0 on \S+ noticed first: \w+",
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
    assert said.count("ended by an error; the same command continues") == 1
    assert builders.files_of(tmp_path / "run")[0] == 5  # what was committed is there


def test_ranks_that_lack_memory_begin_again_with_a_smaller_plan(config, tmp_path):
    job = start(config, "--nproc", "2", overrides=["train.fit_memory=true"], fault="1:7:memory")
    said = job.communicate(timeout=150)[0]
    assert job.returncode == 0, said
    sizes = [float(planned) for planned in re.findall(r"train\.fit_memory: .*: planned (\S+) of", said)]
    assert len(sizes) == 2
    assert said.count("continuing after step 5 of 12") == 1
    noted = json.loads((tmp_path / "run" / "lacked-memory.json").read_text())["chosen"]
    first, second = re.findall(r"train\.fit_memory: (.*): planned", said)
    assert first == " ".join(f"{key}={str(value).lower()}" for key, value in noted.items())
    assert second != first
    assert builders.files_of(tmp_path / "run")[0] == 12


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --head"),
        (["--nnodes", "2", "--node-rank", "2", "--head", "h"], "--node-rank 2: must be below --nnodes 2"),
        (["--head", "node7:29400"], "--head node7:29400: needs --nnodes N, the number of machines, or leave it out"),
        (["--node-rank", "1"], "--node-rank 1: needs --nnodes N"),
        (["--nnodes", "0"], "--nnodes must be at least 1, got 0"),
        (["--nnodes", "2", "--head", "no-such-host.invalid"], "cannot resolve it"),
        (["--nnodes", "2", "--node-rank", "0", "--head", "203.0.113.9"], "is no address of this machine"),
        (["--max-restarts", "-1"], "--max-restarts must be at least 0, got -1"),
    ],
)
def test_places_that_cannot_be(options, problem, config):
    command = [ROOT / "launch" / "torchrun", *options, config]
    environment = {**os.environ, "LIFTDIST_PYTHON": sys.executable}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("liftdist: ")
    assert problem in run.stderr
    assert run.stderr.count("\n") == 1
