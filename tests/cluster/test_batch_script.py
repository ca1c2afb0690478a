"""The batch script on real daemons: a job that can start no rank ends, and says why."""

import os
import re
import subprocess
import sys

import builders
import pytest
from commands import INJECT, ROOT, run_command, write_job_config
from faulty_slurm import failing, state_of, wait_for_state, wait_for_text, wrap

from liftdist.cluster import scheduler

BEGINNINGS = {
    "no names of nodes": ({"scontrol": '[[ ${2-} != hostnames ]] || { echo "Zero Bytes were transmitted" >&2; exit 1; }'},
                          {}, "scontrol show hostnames node.*: not the names of 1 nodes: .*Zero Bytes were transmitted"),
    "an empty answer": ({"scontrol": '[[ ${2-} != hostnames ]] || exit 0'}, {}, "not the names of 1 nodes"),
    "no python": ({}, {"LIFTDIST_PYTHON": "/no/such/python"}, "/no/such/python cannot be run on node"),
    "a python that is no program": ({}, {"LIFTDIST_PYTHON": "/etc/hostname"}, "/etc/hostname cannot be run on node"),
    "a python that says nothing": ({}, {"LIFTDIST_PYTHON": "/bin/true"}, "begin ended with code 0 and no answer"),
    "a python that fails": ({}, {"LIFTDIST_PYTHON": "/bin/false"}, "begin ended with code 1 and no answer"),
    "a python that is killed": ({}, {"LIFTDIST_PYTHON": "KILLED"}, "begin ended with code 137 and no answer"),
    "no scratch": ({"mktemp": "exit 1"}, {}, "no folder for temporary files"),
    "no random numbers": ({"od": "exit 1"}, {}, "no random numbers in /dev/urandom"),
    "no step": ({"srun": "echo 'srun: error: Unable to create step for job 1: Requested nodes are busy' >&2; exit 213"}, {},
                "no rank was started"),
    "srun hears nothing": ({"srun": "echo 'srun: error: Unable to confirm allocation' >&2; exit 1"}, {}, "no rank was started"),
    "a wrong config": ({}, {"ARGUMENTS": "no-such.yaml"}, "no-such.yaml"),
    "no config": ({}, {"ARGUMENTS": ""}, "needs a config"),
    "half an option": ({}, {"ARGUMENTS": "--pyxis"}, "the batch script failed with code 1, the log says why"),
    "a bug": ({}, {"LIFTDIST_TRY_BUG": "1", "PYTHONPATH": "BUG"}, "ZeroDivisionError: a bug in begin"),
}  # fmt: skip


@pytest.fixture(scope="module")
def beginnings(cluster, tiny_model, tmp_path_factory):
    """All jobs at once: for each case its state, comment and log."""
    folder = tmp_path_factory.mktemp("beginnings")
    killed = folder / "killed"
    killed.write_text("#!/bin/bash\nkill -KILL $$\n")
    killed.chmod(0o755)
    (folder / "sitecustomize.py").write_text(
        "from liftdist.cluster import history\n"
        "def fail(): raise ZeroDivisionError('a bug in begin')\n"
        "history.this_start = fail\n"
    )
    ids = {}
    for number, (case, (wrapped, variables, _)) in enumerate(BEGINNINGS.items()):
        place = folder / str(number)
        (place / "faulty").mkdir(parents=True)
        for command, code in wrapped.items():
            wrap(place / "faulty", command, code, times=99)
        config = write_job_config(place, tiny_model, builders.write_records(place / "records.jsonl"))
        given = {"LIFTDIST_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "ARGUMENTS": str(config)} | variables
        given = {
            key: {"KILLED": str(killed), "BUG": f"{folder}:{ROOT}"}.get(value, value) for key, value in given.items()
        }
        words = given.pop("ARGUMENTS").split()
        environment = {**os.environ, "PATH": f"{place}/faulty:{os.environ['PATH']}", "LIFTDIST_PATIENCE": "2", **given}
        command = [
            "sbatch",
            "--parsable",
            "--nodes=1",
            f"--output={place}/log",
            str(ROOT / "slurm" / "train.sbatch"),
            *words,
        ]
        ids[case] = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    ended = {}
    for number, (case, id) in enumerate(ids.items()):
        wait_for_state(id, "FAILED", "COMPLETED", seconds=120)
        shown = subprocess.run(["scontrol", "show", "job", id], capture_output=True, text=True, check=True).stdout
        ended[case] = (
            state_of(id),
            scheduler.fields(shown).get("Comment", ""),
            (folder / str(number) / "log").read_text(),
        )
    return ended


@pytest.mark.parametrize("case", BEGINNINGS)
def test_a_job_that_can_start_no_rank_ends_and_says_why(case, beginnings):
    state, comment, log = beginnings[case]
    reason = BEGINNINGS[case][2]
    assert state == ["FAILED"]
    assert re.match(f"liftdist: .*{reason}", comment), (comment, log)
    assert re.search(r"unbound variable" if case == "half an option" else reason, log), log


def test_outside_of_a_job_the_batch_script_says_so():
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "train.sbatch", "x.yaml"],
        capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch("liftdist: SLURM_JOB_ID is not set, so this is no SLURM job: .*\n", done.stderr)


@pytest.mark.slow
def test_a_job_comes_to_its_end_though_slurm_fails_at_every_turn(cluster, tiny_model, tmp_path, faulty):
    """Each of its commands fails first; it is warned of its time limit while no requeue is possible, and goes on."""
    scontrol = faulty(
        "scontrol", failing("slurm_load error: Unable to contact slurm controller (connect failure)"), times=2
    )
    srun = faulty(
        "srun", "echo 'srun: error: Unable to create step: Socket timed out on send/recv operation' >&2; exit 213"
    )
    records = builders.write_records(tmp_path / "records.jsonl")
    slurm = dict(ranks_per_node=1, cpus_per_task=1, time="30")
    config = write_job_config(tmp_path, tiny_model, records, steps=20, slurm=slurm)
    done = run_command("submit", config, environment={"SLOW": "0.5:1", "PYTHONPATH": f"{INJECT}:{ROOT}"})
    id = re.search(r"^job (\d+)", done.stdout, re.M)[1]
    log = tmp_path / "run" / "logs" / f"slurm-{id}.out"
    wait_for_text(log, "training 3/")
    assert scontrol() >= 3
    assert "SLURM did not start the step; trying again" in log.read_text()
    (tmp_path / "faulty" / "scontrol.calls").write_text("")
    subprocess.run(["scancel", "--batch", "--signal=USR1", id], check=True)
    wait_for_text(log, "liftdist: requeued")
    wait_for_text(log, "liftdist: finished at step 20")
    wait_for_state(id, "COMPLETED")
    assert log.read_text().count("liftdist: requeued") == 1
    assert srun() > 3
