"""Inside a run directory jobs and commands open nothing through a symbolic link that somebody has put there."""

import json
import os
import subprocess
import sys
import time

import builders
import pytest
from commands import ROOT, call, run_command, write_job_config

from liftdist import failures
from liftdist.cluster import cancel, health, history, job, launcher
from liftdist.errors import UserError

LINK = "is a symbolic link; symbolic links inside a run directory are not followed"


@pytest.fixture
def canary(tmp_path):
    """A file outside of the run directory; whatever is printed, its text must not be in it."""
    path = tmp_path / "canary"
    path.write_text("a secret of somebody else\n")
    os.utime(path, (1e9, 1e9))
    yield path
    assert path.read_text() == "a secret of somebody else\n"
    assert path.stat().st_mtime == 1e9


@pytest.fixture
def nothing(tmp_path):
    """A name outside of the run directory at which nothing must appear."""
    path = tmp_path / "nothing"
    yield path
    assert not path.exists()


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)
    return path


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))


@pytest.fixture
def in_job(monkeypatch):
    """The environment of the batch script of a job with one node."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "LIFTDIST_NODES": "n0"}.items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------------------------------------------------------------
# The batch script.


def test_the_batch_script_marks_a_file_and_not_what_it_links_to(run_dir, canary, nothing):
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    mark = script[script.index("mark() {") : script.index("request_stop()")]
    targets = [run_dir / "new", run_dir / "linked", run_dir / "dangling", run_dir / "folder"]
    targets[1].symlink_to(canary)
    targets[2].symlink_to(nothing)
    targets[3].symlink_to(run_dir.parent)
    began = time.time()
    for target in targets:
        subprocess.run(["bash", "-uc", f'{mark}\nmark "$1"', "bash", target], check=True)
        assert not target.is_symlink()
        assert (target.read_text(), target.stat().st_mtime > began - 2) == ("", True)
    assert {path.name for path in run_dir.iterdir()} == {"logs", *(target.name for target in targets)}
    assert "touch" not in script.replace("not touch", "")


# ---------------------------------------------------------------------------------------------------------------------
# The job.


def test_a_job_begins_with_no_file_of_others(config, run_dir, canary, in_job):
    (run_dir / "attempts").mkdir()
    logs = run_dir / "logs" / "7-0.0"
    logs.mkdir()
    (logs / "rank-00001.log").symlink_to(canary)
    (logs / "config.yaml").symlink_to(canary)
    job.begin([str(config)], ["n0"])
    assert [path.name for path in logs.iterdir()] == ["config.yaml"]
    assert (logs / "config.yaml").read_text() == config.read_text()


def test_a_folder_in_the_way_of_a_job_is_named(config, run_dir, in_job):
    (run_dir / "attempts").mkdir()
    (run_dir / "logs" / "7-0.0" / "rank-00001.log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"logs/7-0.0/rank-00001.log: Is a directory; remove it"):
        job.begin([str(config)], ["n0"])


def test_a_kept_config_that_became_a_link_is_not_read(config, run_dir, canary, in_job, monkeypatch):
    kept = run_dir / "logs" / "submitted-20260101-000000.yaml"
    kept.symlink_to(canary)
    with pytest.raises(UserError, match=f"config {kept}: {LINK}"):
        job.begin([str(kept)], ["n0"])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    with pytest.raises(UserError, match=f"config {kept}: {LINK}"):
        job.begin([str(kept)], ["n0"])
    logs = run_dir / "logs" / "7_0-0.0"
    logs.mkdir()
    (logs / "config.yaml").symlink_to(canary)
    monkeypatch.setenv("LIFTDIST_LOGS", str(logs))
    with pytest.raises(UserError, match=f"config {logs / 'config.yaml'}: {LINK}"):
        job.end([str(logs / "config.yaml")], ["n0"], logs, "", False, False)
    linked = run_dir.parent / "linked.yaml"  # of the user's own
    linked.symlink_to(config)
    assert job._load([str(linked)])[0].train.steps == 30


def test_signs_of_life_are_not_those_of_other_files(run_dir, tmp_path):
    """A report that is a link makes no node dead or ended, and what was found about nodes is not read through one."""
    logs, old, problems = run_dir / "logs", tmp_path / "old.json", tmp_path / "problems.json"
    old.write_text('{"host": "n0"}')
    os.utime(old, (1e9, 1e9))
    problems.write_text('[["n0", "a lie"]]')
    (logs / "node-00000.json").symlink_to(old)
    (logs / "node-00001.json").write_text('{"host": "n1"}')
    (logs / "node-00002.json").write_text("17")
    (logs / "problems.json").symlink_to(problems)
    assert health.without_heartbeat(["n0", "n1", "n2"], logs) == []
    assert health._problems(logs) == []
    (logs / health.NOW).symlink_to(tmp_path / "records.jsonl")
    os.utime(logs / health.NOW, follow_symlinks=False)
    os.utime(logs / "node-00001.json", (1e9, 1e9))
    assert health.lost(["n0", "n1"], logs, "") == ["n1"]


# ---------------------------------------------------------------------------------------------------------------------
# The launcher.


def launch(config, run_dir, *overrides):
    """The launcher as the task of a SLURM step on one node; its exit code and what it said."""
    logs = run_dir / "logs" / "7-0.0"
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "liftdist.cluster.launcher", str(config), *overrides],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=200,
        env={**os.environ, **step, "SLURM_JOB_ID": "7", "LIFTDIST_LOGS": str(logs), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr


def test_the_launcher_writes_its_files_and_not_what_they_link_to(config, run_dir, canary, nothing):
    """A rank that refuses its settings, so that every file of an end is written."""
    logs = run_dir / "logs" / "7-0.0"
    logs.mkdir()
    (logs / launcher.FAILED).symlink_to(nothing)
    for name in ("node-00000.json", "node-00000.status", "rank-00000.failure.json"):
        (logs / name).symlink_to(canary)
    code, _ = launch(config, run_dir, "mesh.dp_replicate=2")
    assert code == 1
    assert not (logs / launcher.FAILED).is_symlink()
    assert (logs / launcher.FAILED).exists()
    assert json.loads((logs / "node-00000.json").read_text())["code"] == 2
    (found,) = failures.read(logs)
    assert found.kind == failures.USER_ERROR
    assert "1 ranks cannot be 2 replicas" in found.error


def test_a_log_of_torchrun_that_is_a_link_ends_the_launcher(config, run_dir, canary):
    logs = run_dir / "logs" / "7-0.0"
    logs.mkdir()
    (logs / "node-00000.torchrun.log").symlink_to(canary)
    code, said = launch(config, run_dir)
    assert (code, said) == (2, f"liftdist: {logs / 'node-00000.torchrun.log'}: {LINK}\n")
    (found,) = failures.read(logs)
    assert (found.kind, found.error) == (failures.USER_ERROR, said.removeprefix("liftdist: ").strip())


def test_torchruns_last_words_are_its_own(run_dir, tmp_path):
    words = tmp_path / "words"
    words.write_text("RuntimeError: a lie\n")
    linked, cut, real = (run_dir / name for name in ("node-00000.torchrun.log", "b", "c"))
    linked.symlink_to(words)
    cut.write_bytes(b"RuntimeError: \xff\xfe\n")
    real.write_text("x\nValueError: the truth\n")
    assert launcher.last_words([linked, cut, real]) == "torchrun: ValueError: the truth"
    assert launcher.last_words([linked]) == "torchrun ended without a message"


# ---------------------------------------------------------------------------------------------------------------------
# The commands of users.


def submitted(run_dir, log=None):
    history.note(run_dir, "submit", job="7", array=None, log=str(log or run_dir / "logs"))


def test_logs_are_read_as_they_are(run_dir):
    submitted(run_dir)
    assert call("logs", run_dir) == (2, f"liftdist: {run_dir}/logs/slurm-7.out: the job has written nothing yet\n")
    (run_dir / "logs" / "slurm-7.out").write_bytes(b"one\n\xff two\n")
    command = [sys.executable, "-m", "liftdist", "logs", str(run_dir)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout == b"one\n\xff two\n"


def test_a_job_is_followed_until_it_ends(cluster, run_dir):
    log = run_dir / "logs" / "slurm-%j.out"
    queue = ["sbatch", "--parsable", f"--output={log}", "--wrap=echo one; sleep 4; echo two"]
    id = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.strip()
    history.note(run_dir, "submit", job=id, array=None, log=str(log.parent))
    followed = run_command("logs", "-f", run_dir)
    assert (followed.returncode, followed.stdout) == (0, "one\ntwo\n")


@pytest.mark.parametrize("place", ["file", "folder", "history"])
def test_no_log_is_read_through_a_link(place, run_dir, canary):
    submitted(run_dir)
    outside = run_dir.parent / "outside"
    outside.mkdir()
    if place == "file":
        (run_dir / "logs" / "slurm-7.out").symlink_to(canary)
    elif place == "folder":
        (outside / "slurm-7.out").write_text(canary.read_text())
        (run_dir / "logs").rmdir()
        (run_dir / "logs").symlink_to(outside)
    else:
        (run_dir / history.JOBS).rename(outside / history.JOBS)
        (run_dir / history.JOBS).symlink_to(outside / history.JOBS)
    code, said = call("logs", run_dir)
    assert (code, said.count("\n")) == (2, 1)
    assert "symbolic links inside a run directory are not followed" in said
    assert "secret" not in said


def test_no_output_of_a_rank_is_read_through_a_link(run_dir, canary):
    submitted(run_dir)
    outside = run_dir.parent / "outside"
    outside.mkdir()
    (outside / "rank-00001.log").write_text(canary.read_text())
    (run_dir / "logs" / "7-0.0").symlink_to(outside)
    assert call("logs", run_dir, "--rank=1")[1] == (
        f"liftdist: {run_dir}: no output of rank 1; that of rank 0 is in the log of the job\n"
    )
    (run_dir / "logs" / "7-1.0").mkdir()
    (run_dir / "logs" / "7-1.0" / "rank-00001.log").symlink_to(canary)
    assert call("logs", run_dir, "--rank=1") == (2, f"liftdist: {run_dir}/logs/7-1.0/rank-00001.log: {LINK}\n")


def test_the_status_is_of_the_runs_own_files(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # there is no SLURM to ask
    submitted(run_dir)
    figures = {"step": 3, "train/loss": 1.5, "throughput/tokens_per_second": 10.0}
    for name, text in {"metrics.jsonl": json.dumps(figures), "config.yaml": "train: {steps: 9}"}.items():
        (tmp_path / name).write_text(text)
        (run_dir / name).symlink_to(tmp_path / name)
    assert "step " not in call("status", run_dir)[1]
    for name in ("metrics.jsonl", "config.yaml"):
        (run_dir / name).unlink()
        (tmp_path / name).rename(run_dir / name)
    assert "step     3 of 9  loss 1.5000  10 tokens/s\n" in call("status", run_dir)[1]


def test_a_run_elsewhere_is_no_task_of_an_array(run_dir, tmp_path):
    submitted(run_dir)
    for name in ("0-x", "other"):
        (tmp_path / name).mkdir()
        submitted(tmp_path / name)
    (tmp_path / "0-x").rename(run_dir / "0-x")
    (run_dir / "1-y").symlink_to(tmp_path / "other")
    assert history.runs(run_dir) == [run_dir / "0-x"]


def test_a_request_to_stop_is_a_file_of_the_run(run_dir, canary, nothing):
    for target in (canary, nothing):
        (run_dir / "stop-requested").unlink(missing_ok=True)
        (run_dir / "stop-requested").symlink_to(target)
        cancel.request_stop(run_dir)
        assert (run_dir / "stop-requested").lstat().st_size == 0
        assert not (run_dir / "stop-requested").is_symlink()
    with pytest.raises(UserError, match="No such file or directory"):
        cancel.request_stop(run_dir / "gone")


def test_what_an_array_is_submitted_with_is_kept_in_a_folder_of_its_own(cluster, config, run_dir, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (run_dir / "logs").rmdir()
    (run_dir / "logs").symlink_to(outside)
    code, said = call("submit", config, "--sweep=train.seed=1,2")
    assert (code, said) == (
        2, f"liftdist: {run_dir}/logs: is not a folder; symbolic links inside a run directory are not followed\n"
    )  # fmt: skip
    assert list(outside.iterdir()) == []
