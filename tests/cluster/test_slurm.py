"""Runs as jobs of a real SLURM cluster: warned, preempted, requeued, cancelled; nodes that die; ranks that fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
import ranks
from commands import INJECT, ROOT, write_job_config

from liftdist import config as configs
from liftdist.cluster import history, scheduler
from liftdist.runs import claims

STEPS = 60


def liftdist(*words, code=0, **variables):
    """Run a command of the user's; its output."""
    run = subprocess.run(
        [sys.executable, "-m", "liftdist", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(INJECT), **variables},
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


class Submitted:
    """A run that was submitted, and what becomes of it."""

    def __init__(self, config, run_dir, *options, **variables):
        self.run_dir = Path(run_dir)
        said = liftdist("submit", config, f"run_dir={run_dir}", *options, **variables)
        self.id = re.search(r"^job (\d+)", said, re.M)[1]

    @property
    def log(self):
        logs = list((self.run_dir / "logs").glob("slurm-*.out"))
        return "".join(path.read_text() for path in logs)

    def wait_for(self, text, seconds=90):
        """Wait until the log has a line with ``text`` that no earlier call has seen."""
        began = time.monotonic()
        seen = getattr(self, "_seen", 0)
        while (found := re.compile(text).search(log := self.log, seen)) is None:
            assert time.monotonic() - began < seconds, f"no {text!r} in\n{log}\n{scheduler.jobs([self.id])}"
            time.sleep(0.1)
        self._seen = found.end()

    def wait_for_state(self, *states, seconds=120):
        began = time.monotonic()
        while (state := scheduler.jobs([self.id])[0].state) not in states:
            assert time.monotonic() - began < seconds, f"{state}\n{self.log}"
            time.sleep(0.2)
        return state

    @property
    def ends(self):
        """How each start ended: ``(cause, action)``."""
        return [(event["cause"], event["action"]) for event in history.read(self.run_dir) if event["event"] == "end"]

    @property
    def comment(self):
        return scheduler.fields(scontrol("show", "job", self.id)).get("Comment", "").strip()


def scontrol(*words):
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def config(cluster, tiny_model, tmp_path):
    """Two nodes with a rank each."""
    records = builders.write_records(tmp_path / "records.jsonl")
    slurm = dict(nodes=2, ranks_per_node=1, cpus_per_task=1, time="30")
    return write_job_config(tmp_path, tiny_model, records, save_every=10, slurm=slurm, steps=STEPS)


def undisturbed(mesh, path, run_dir, steps):
    loaded, text = configs.load(path, [f"run_dir={run_dir}", f"train.steps={steps}"])
    return builders.run_once(mesh, loaded, text)


def check_undisturbed(config, submitted, ranks_of_it=2):
    """The end of a run is that of one that nothing happened to, to the bit."""
    other = submitted.run_dir.parent / "undisturbed"
    assert set(ranks.run(ranks_of_it, undisturbed, config, other, STEPS)) == {"finished"}
    step, files = builders.files_of(other)
    assert step == STEPS
    assert builders.files_of(submitted.run_dir) == (step, files)


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_is_warned_requeued_and_preempted_ends_as_if_nothing_had_happened(nodes, config, tmp_path):
    run = Submitted(config, tmp_path / "run", f"--nodes={nodes}", SLOW="0.2:3")
    run.wait_for("training 3/")
    subprocess.run(
        ["scancel", "--batch", "--signal=USR1", run.id], check=True
    )  # as --signal does before the time limit
    run.wait_for("time limit, saved step")
    run.wait_for("continuing after step [1-9]")
    run.wait_for("training")
    if nodes > 1:
        subprocess.run(["scontrol", "requeue", run.id], check=True)
        run.wait_for("continuing after step [1-9]")
        run.wait_for("training")
    urgent = [
        "sbatch",
        "--parsable",
        "-N6",
        "--exclusive",
        "--partition=urgent",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    subprocess.run(urgent, check=True, capture_output=True)
    run.wait_for("preempted, saved step")
    run.wait_for("continuing after step [1-9]")
    assert run.wait_for_state("COMPLETED") == "COMPLETED"
    by_slurm = [(None, "nothing")] * (nodes - 1)
    assert run.ends == [("time limit", "requeue"), *by_slurm, ("preempted", "requeue"), (None, "done")]
    assert run.comment == f"liftdist: finished at step {STEPS}"
    said = liftdist("status", tmp_path / "run")
    assert f"job      {run.id}  COMPLETED" in said
    assert "preempted, saved step" in said
    assert f"step     {STEPS} of {STEPS}  loss" in said
    assert f"saved    step {STEPS}" in said
    assert run.log == liftdist("logs", tmp_path / "run")
    assert "Traceback" not in run.log
    check_undisturbed(config, run, nodes)


@pytest.mark.slow
def test_one_task_of_an_array_is_requeued_alone(config, tmp_path):
    """Two tasks at once on one node, with a run directory and a value each; one is warned."""
    said = liftdist(
        "submit", config, f"run_dir={tmp_path}/sweep", "--nodes=1", "--sweep=optimizer.lr=1e-3,5e-3", SLOW="0.05"
    )
    array = re.search(r"^job (\d+)_0", said, re.M)[1]
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.name[0] in "01")
    assert len(folders) == 2
    began = time.monotonic()
    while not (folders[1] / "metrics.jsonl").exists() or not (folders[1] / "metrics.jsonl").read_text().count("loss"):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_1"], check=True)
    while any(not known.has_ended for known in scheduler.jobs([array])):
        assert time.monotonic() - began < 120
        time.sleep(0.5)
    causes = [[e["cause"] for e in history.read(folder) if e["event"] == "end"] for folder in folders]
    assert causes == [[None], ["time limit", None]]
    rates = [configs.load(folder / "config.yaml")[0].optimizer.lr for folder in folders]
    assert rates == [1e-3, 5e-3]
    assert {builders.files_of(folder)[0] for folder in folders} == {STEPS}
    assert liftdist("status", tmp_path / "sweep").count("COMPLETED") == 2


@pytest.mark.slow
def test_a_node_that_dies_and_one_that_is_cut_off(cluster, config, tmp_path):
    """A node of a job is powered off. The node of another job loses its network and trains on, beside the requeued job."""
    dying = Submitted(config, tmp_path / "dying", "mesh.timeout_minutes=0.2", SLOW="0.1:1")
    cut = Submitted(config, tmp_path / "cut", "--nodes=1", "checkpoint.keep=50", "checkpoint.interval=5", SLOW="1.5:1")
    dying.wait_for("checkpoint step-00000010")
    cut.wait_for("checkpoint step-00000005")
    (lost,) = scheduler.node_names(scheduler.jobs([cut.id])[0].nodes)
    dead = scheduler.node_names(scheduler.jobs([dying.id])[0].nodes)[1]
    committed = claims.attempts(dying.run_dir)[1]
    cluster("cut", lost)
    cluster("power-off", dead)
    try:
        dying.wait_for("continuing after step [1-5]0")
        cut.wait_for(r"attempt 2\)")
        began = time.monotonic()
        while not any(event.get("event") == "end" for event in claims.attempts(cut.run_dir)[1]):
            assert time.monotonic() - began < 60  # it hears of its successor when it saves
            time.sleep(0.2)
        assert "has taken over from this one" in str(claims.attempts(cut.run_dir)[1][-1]["reason"])
        assert dying.wait_for_state("COMPLETED") == "COMPLETED"
        assert cut.wait_for_state("COMPLETED") == "COMPLETED"
    finally:
        cluster("join", lost)
        cluster("start", dead)
    starts = [event for event in history.read(dying.run_dir) if event["event"] == "start"]
    assert dead not in starts[1]["nodes"]
    accepted = set(json.dumps(claims.attempts(dying.run_dir)[2][0]["accepts"]).split('"'))
    assert {f"step-{event['step']:08d}" for event in committed if event["event"] == "commit"} <= accepted
    check_undisturbed(config, dying)
    (tmp_path / "undisturbed").rename(tmp_path / "undisturbed-2")
    check_undisturbed(config, cut, 1)


def test_a_bug_fails_once_with_one_summary_and_a_cancelled_job_saves(config, tmp_path):
    """The second job's names would run something in every shell that took them for more than words."""
    failing = Submitted(config, tmp_path / "failing", "slurm.max_restarts=1", FAULT="1:15:bug")
    hostile = tmp_path / "a b$(touch canary)`touch canary`'\"; touch canary; %j#&|"
    running = Submitted(config, hostile, "--nodes=1", "data.chat_template=$(touch canary)", SLOW="2")
    waiting = liftdist("submit", config, f"run_dir={tmp_path}/waiting", "--dependency", f"afterany:{running.id}")
    running.wait_for("training 2/")
    again = liftdist("submit", config, f"run_dir={hostile}", code=2)
    assert f"in use by job slurm {running.id}" in again
    assert failing.wait_for_state("FAILED") == "FAILED"
    assert failing.ends == [(None, "restart"), (None, "fail")]
    assert failing.log.count("failed first: ZeroDivisionError: a bug in this rank") == 2
    assert failing.log.count("Traceback (most recent call last)") == 2  # one for each time it failed
    assert "continuing after step 10" in failing.log
    assert re.fullmatch(
        r"liftdist: rank 1 on node\d failed first: ZeroDivisionError: a bug in this rank", failing.comment
    )
    assert "given up" in liftdist("status", tmp_path / "failing")
    liftdist("cancel", tmp_path / "waiting")
    ids = re.findall(r"^job (\d+)", waiting, re.M)
    assert [known.state for known in scheduler.jobs(ids)] == ["CANCELLED"]
    liftdist("cancel", hostile)
    running.wait_for("stopped as asked, saved step")
    assert running.wait_for_state("FAILED") == "FAILED"  # not COMPLETED: it has not finished
    assert builders.files_of(hostile)[0] >= 2
    assert not [folder for folder in (ROOT, tmp_path, hostile) if (folder / "canary").exists()]


@pytest.mark.slow
def test_scancel_saves_what_it_can_and_a_time_limit_without_warning_is_survived(config, tmp_path):
    cancelled = Submitted(config, tmp_path / "cancelled", SLOW="0.1")
    late = Submitted(
        config, tmp_path / "late", "--time=1", "slurm.signal_lead=30", 'slurm.options=["--signal=B:URG@10"]', SLOW="0.7"
    )
    cancelled.wait_for("training 3/")
    subprocess.run(["scancel", cancelled.id], check=True)
    assert cancelled.wait_for_state("CANCELLED") == "CANCELLED"
    assert cancelled.ends == [(None, "nothing")]
    assert "cancelled, saved step" in cancelled.log
    late.wait_for("DUE TO TIME LIMIT", 150)
    late.wait_for("time limit, saved step")
    late.wait_for("continuing after step [1-9]")
    assert late.wait_for_state("COMPLETED", seconds=300) == "COMPLETED"
    check_undisturbed(config, late)


@pytest.mark.slow
def test_where_requeueing_is_disabled_a_job_is_submitted_again(config, tmp_path):
    command = ["sbatch", "--parsable", "--no-requeue", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path}/%j.out"]
    environment = {**os.environ, "LIFTDIST_PYTHON": sys.executable, "PYTHONPATH": str(INJECT), "SLOW": "0.05"}
    words = [str(ROOT / "slurm" / "train.sbatch"), str(config), f"run_dir={tmp_path}/run"]
    submitted = subprocess.run([*command, *words], capture_output=True, text=True, check=True, env=environment)
    first = submitted.stdout.strip()
    wait_until(lambda: "training 3/" in (tmp_path / f"{first}.out").read_text(), tmp_path / f"{first}.out")
    subprocess.run(["scancel", "--batch", "--signal=USR1", first], check=True)
    wait_until(lambda: len(history.read(tmp_path / "run")) == 4)
    assert [event["family"] for event in history.read(tmp_path / "run")] == [first] * 4
    assert builders.files_of(tmp_path / "run")[0] == STEPS


def wait_until(condition, path=None, seconds=120):
    began = time.monotonic()
    while (path is not None and not path.exists()) or not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)


@pytest.mark.slow
def test_a_node_that_slurm_has_not_missed_yet_is_named_and_left_out(cluster, config, tmp_path):
    """The survivors notice before SLURM does: the job names the node, and is requeued without it."""
    conf = Path(os.environ["SLURM_CONF"])
    text = conf.read_text()
    conf.write_text(text.replace("SlurmdTimeout=8", "SlurmdTimeout=90"))
    scontrol("reconfigure")
    try:
        run = Submitted(config, tmp_path / "run", "mesh.timeout_minutes=0.1", SLOW="0.05")
        run.wait_for("checkpoint step-00000010")
        dead = scheduler.node_names(scheduler.jobs([run.id])[0].nodes)[1]
        cluster("power-off", dead)
        run.wait_for(f"lost {dead} at step", 100)
        wait_until(lambda: f"ExcNodeList={dead}" in scontrol("show", "job", run.id))
    finally:
        conf.write_text(text)
        scontrol("reconfigure")
        cluster("start", dead)
    assert run.wait_for_state("COMPLETED", seconds=200) == "COMPLETED"
    check_undisturbed(config, run)


@pytest.mark.slow
def test_the_quickstart_on_two_nodes_does_what_four_ranks_on_one_machine_do(cluster, smollm2, tmp_path):
    """The real model: the same masks, and the same losses but for the order of summation."""
    import quickstart

    quickstart.write_problems(ROOT / ".cache" / "quickstart")
    settings = [
        "configs/quickstart.yaml",
        "train.steps=6",
        "train.export=false",
        "eval.tasks=[]",
        f"cache_dir={tmp_path}/cache",
    ]
    run = Submitted(settings[0], tmp_path / "apart", *settings[1:])
    assert run.wait_for_state("COMPLETED", seconds=200) == "COMPLETED"
    liftdist("train", *settings, "--nproc=4", f"run_dir={tmp_path}/one", f"cache_dir={tmp_path}/other-cache")
    losses = [
        [line["train/loss"] for line in map(json.loads, (folder / "metrics.jsonl").open()) if "train/loss" in line]
        for folder in (tmp_path / "apart", tmp_path / "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert builders.files_of(tmp_path / "apart") == builders.files_of(tmp_path / "one")
