"""SLURM that answers now and then: its commands fail, hang or print more than they should, and its controller goes away.

Wrappers first on PATH do that; what they let through reaches real daemons.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
from commands import call, liftdist, run_command, write_job_config
from faulty_slurm import failing, real_path, state_of, wait_for_state

from liftdist.cluster import cancel, commands, history, scheduler
from liftdist.errors import UserError

TEMPORARY = [
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Socket timed out on send/recv operation",
    "squeue: error: slurm_receive_msg: Zero Bytes were transmitted or received",
    "slurm_load_jobs error: Communication connection failure",
    "slurm_load_jobs error: Unexpected message received",
    "slurm_load_jobs error: Slurm backup controller in standby mode",
    "slurm_load_jobs error: Resource temporarily unavailable",
    "slurm_load_jobs error: Protocol authentication error",
    "squeue: error: Munge encode failed: Failed to connect to \"/run/munge/munge.socket.2\": Connection refused",
    "squeue: error: _fetch_child: failed to fetch remote configs: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Message receive failure",
    "squeue: error: Error connecting slurm stream socket at 10.0.0.1:6817: Connection reset by peer",
    "slurm_load_jobs error: Transport endpoint is not connected",
]  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    """The same bounds, on a faster clock."""
    monkeypatch.setattr(commands, "pauses", lambda: itertools.repeat(0.02))
    monkeypatch.setattr(commands, "_LOOKS", (0.1, 0.1, 0.1))
    monkeypatch.setattr(commands, "_ANSWER", 1.0)
    monkeypatch.setattr(commands, "_SUBMISSION", 1.0)
    monkeypatch.setattr(cancel, "_POLL", 0.1)
    monkeypatch.setenv("LIFTDIST_PATIENCE", "3")


HANGS = "sleep 7654321"
WITH_A_CHILD = "sleep 7654321 & wait"
DONE_ALL_THE_SAME = '$real "$@" >/dev/null; ' + failing("Socket timed out on send/recv operation")
DONE_AND_HANGS = f'$real "$@" >/dev/null; {HANGS}'
BANNER = 'printf "%s\\n" "-----------------" "   Welcome to the Stampede3|12|RUNNING" "2" "-----------------"'


def queue(tmp_path, *options, script="sleep 1000", lead=1):
    """A job with a run directory, as `submit` leaves it; its id."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(f"slurm: {{signal_lead: {lead}}}")
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}"]
    id = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    array = next((option.partition("=")[2] for option in options if option.startswith("--array")), None)
    history.note(run_dir, "submit", job=id, array=array, log=str(run_dir))
    return id


@pytest.fixture
def queued(cluster, tmp_path):
    """The id of a job that is held, with a run directory."""
    id = queue(tmp_path, "--hold")
    yield id
    subprocess.run(["scancel", id], check=False, capture_output=True)


# ---------------------------------------------------------------------------------------------------------------------
# Questions.


@pytest.mark.parametrize("text", TEMPORARY)
def test_a_question_that_fails_for_now_is_asked_again(text, queued, tmp_path, faulty, impatient):
    calls = faulty("squeue", failing(text), times=2)
    assert [(found.id, found.state) for found in scheduler.jobs([queued])] == [(queued, "PENDING")]
    assert calls() == 3
    assert "JobHeldUser" in liftdist("status", tmp_path / "run")


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--partition=nope", "invalid partition specified: nope"),
        ("--nodes=99", "Requested node configuration is not available"),
        ("--time=x", "Invalid --time specification"), ("--dependency=afterok:x", "Job dependency problem"),
        ("--no-such-option", "unrecognized option"), ("--uid=nobody9", "Invalid --uid"),
        ("--gres=fpga:1", "Invalid generic resource"),
    ],
)  # fmt: skip
def test_a_failure_that_lasts_is_reported_at_once(option, problem, cluster, faulty, impatient):
    calls = faulty("sbatch", ":", times=0)
    with pytest.raises(UserError, match=problem):
        scheduler.test_only(["sbatch", option, "--wrap=true"], os.environ)
    assert calls() == 1


@pytest.mark.parametrize("code", [HANGS, WITH_A_CHILD, f"trap '' TERM; {HANGS}", f"{HANGS} & exit 1", f"cat; {HANGS}"])
def test_a_command_that_hangs_is_ended_with_all_that_it_started(code, queued, faulty, impatient):
    faulty("squeue", code)
    began = time.monotonic()
    if "exit 1" in code:  # it has ended, and only what it left behind holds its output
        with pytest.raises(scheduler.Unknown):
            scheduler.jobs([queued])
    else:
        assert [found.state for found in scheduler.jobs([queued])] == ["PENDING"]
    assert time.monotonic() - began < 3
    assert "7654321" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "exit 127", HANGS, BANNER, failing("Slurm accounting storage is disabled"),
        failing("sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:db:6819"),
        failing("sacct: error: Problem talking to the database: Connection refused"),
        "echo '999999|RUNNING by 0|node1'",
    ],
)  # fmt: skip
def test_accounting_is_not_needed(code, queued, faulty, impatient):
    faulty("sacct", f"{code}; exit 0", times=9)
    found = scheduler.jobs([queued, "999999"])
    expected = [(queued, "PENDING"), *([("999999", "RUNNING")] if "999999" in code else [])]
    assert [(known.id, known.state) for known in found] == expected


def test_without_sacct_there_is_no_error(queued, tmp_path, monkeypatch):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("squeue", "scontrol"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    assert scheduler.jobs(["999999"]) == []


def test_status_shows_what_is_known_without_slurm(queued, tmp_path, faulty, impatient, monkeypatch):
    monkeypatch.setattr("liftdist.cluster.submit._BRIEFLY", 0.1)
    for command in ("squeue", "scontrol", "sacct"):
        faulty(command, failing(TEMPORARY[0]), times=99999)
    start = dict(job=queued, start="0.0", family=queued, step=3, nodes=["node1"], log=None)
    history.note(tmp_path / "run", "start", **start)
    code, said = call("status", tmp_path / "run")
    assert code == 0
    assert "SLURM does not answer: squeue: Unable to contact slurm controller (connect failure)" in said
    assert f"start    {queued}-0.0" in said


VARIABLES = {
    "SQUEUE_FORMAT": "%i", "SQUEUE_FORMAT2": "jobid", "SQUEUE_STATES": "RUNNING", "SQUEUE_PARTITION": "urgent",
    "SQUEUE_USERS": "nobody", "SQUEUE_NAMES": "other", "SQUEUE_ACCOUNT": "other", "SQUEUE_QOS": "other", "SQUEUE_SORT": "x",
    "SQUEUE_LICENSES": "other", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "1", "SACCT_FORMAT": "jobname",
    "SCANCEL_INTERACTIVE": "true", "SCANCEL_NAME": "other", "SCANCEL_PARTITION": "urgent", "SCANCEL_STATE": "RUNNING",
    "SCANCEL_USER": "nobody", "SCANCEL_ACCOUNT": "other", "SCANCEL_BATCH": "true", "SCANCEL_VERBOSE": "true",
    "SCONTROL_ALL": "1", "LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de",
}  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_the_variables_of_a_users_shell_change_nothing(name, queued, tmp_path, impatient, monkeypatch):
    monkeypatch.setenv(name, VARIABLES[name])
    assert f"job      {queued}  PENDING  (JobHeldUser)" in liftdist("status", tmp_path / "run")
    assert [found.state for found in scheduler._scontrol([queued], 0)] == ["PENDING"]
    assert f"job {queued} is cancelled" in liftdist("cancel", tmp_path / "run")
    assert state_of(queued) == ["CANCELLED"]


def test_what_a_site_prints_besides_is_no_job(queued, tmp_path, faulty, impatient):
    for command in ("squeue", "scontrol", "scancel", "sacct"):
        faulty(command, BANNER, times=99)
    assert [(found.id, found.state) for found in scheduler.jobs([queued])] == [(queued, "PENDING")]
    liftdist("cancel", tmp_path / "run")
    assert state_of(queued) == ["CANCELLED"]


# ---------------------------------------------------------------------------------------------------------------------
# Submitting.


@pytest.fixture
def config(cluster, tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    return write_job_config(tmp_path, tiny_model, records, slurm=dict(options=["--begin=now+3600"]))


SUBMISSIONS = {
    "nobody there": failing("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"),
    "lost before": failing("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
    "lost after": DONE_ALL_THE_SAME,
    "hangs before": HANGS,
    "hangs after": DONE_AND_HANGS,
    "killed after": '$real "$@" >/dev/null; kill -9 $$',
    "queue full": failing(
        "sbatch: Slurm temporarily unable to accept job, sleeping and retrying\n"
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable"
    ),
    "no id": '$real "$@" >/dev/null; exit 0',
    "warnings": 'echo "sbatch: warning: can\'t honor --ntasks-per-node" >&2; echo "sbatch: Verification: ***PASSED***"',
    "banner": BANNER,
    "a cluster": 'echo "$($real "$@");frontier-2"; exit',
    "a sentence": 'echo "Submitted batch job $($real "$@") on cluster nautilus"; exit',
    "after the id": '$real "$@"; echo "-- 17 jobs of yours are queued --"; exit',
    "fails with an id": '$real "$@"; echo "sbatch: error: epilog of this wrapper" >&2; exit 1',
}  # fmt: skip


@pytest.mark.parametrize("case", SUBMISSIONS)
def test_a_job_is_submitted_once(case, config, tmp_path, faulty, impatient):
    code = SUBMISSIONS[case]
    faulty("sbatch", f'[[ " $* " == *" --test-only "* ]] || {{ {code}\n}}', times=2)
    run_dir = tmp_path / f"run-{case.replace(' ', '-')}"
    said = liftdist("submit", config, f"run_dir={run_dir}")
    id = re.search(r"^job (\d+)  ", said, re.M)[1]
    cluster = {"a cluster": "frontier-2", "a sentence": "nautilus"}.get(case)
    assert cluster is None or f"liftdist: submitted to cluster {cluster}: with SLURM_CLUSTERS={cluster} set" in said
    assert [event["job"] for event in history.read(run_dir)] == [id]
    listed = subprocess.run(
        ["squeue", "--noheader", f"--name={run_dir.name}", "--format=%i"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == [id]
    subprocess.run(["scancel", id], check=True)


def test_where_slurm_stays_away_it_is_said_what_may_be_queued(config, tmp_path, faulty, impatient):
    faulty("sbatch", f'[[ " $* " == *" --test-only "* ]] || {{ {DONE_ALL_THE_SAME}\n}}', times=99)
    faulty("squeue", failing(TEMPORARY[1]), times=99999)
    code, said = call("submit", config, f"run_dir={tmp_path}/away")
    assert code == 2
    mark = re.search(r"its command has (submitted-\S+)\)", said)[1]
    id = subprocess.run(
        ["squeue", "--noheader", "--name=away", "--format=%i %o"],
        capture_output=True, text=True, check=True, env={**os.environ, "PATH": real_path()},
    ).stdout.split()[0]  # fmt: skip
    assert mark in subprocess.run(["scontrol", "show", "job", id], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scancel", id], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Cancelling.


def suspended(id):
    wait_for_state(id, "RUNNING")
    subprocess.run(["scontrol", "suspend", id], check=True)


def requeued_and_held(id):
    wait_for_state(id, "RUNNING")
    subprocess.run(["scontrol", "requeuehold", id], check=True)


def running(id):
    wait_for_state(id, "RUNNING")


JOBS = {
    "held": (["--hold"], None),
    "for later": (["--begin=now+3600"], None),
    "an array": (["--hold", "--array=0-3"], None),
    "an array, one at a time": (["--array=0-3%1"], None),
    "that runs and hears nothing": ([], running),
    "suspended": ([], suspended),
    "requeued": ([], requeued_and_held),
    "of two nodes": (["--nodes=2"], running),
}


@pytest.mark.parametrize("case", JOBS)
def test_every_job_is_cancelled_in_the_end(case, cluster, tmp_path, impatient):
    options, prepare = JOBS[case]
    id = queue(tmp_path, *options)
    if prepare:
        prepare(id)
    liftdist("cancel", tmp_path / "run")
    assert set(state_of(id)) == {"CANCELLED"}
    assert liftdist("cancel", tmp_path / "run") == "nothing is queued or running\n"


@pytest.mark.parametrize(
    "code",
    [
        failing(TEMPORARY[0]),
        pytest.param(failing(TEMPORARY[1]), marks=pytest.mark.slow),
        pytest.param(HANGS, marks=pytest.mark.slow),
        DONE_ALL_THE_SAME,
    ],
)
@pytest.mark.parametrize("command", ["squeue", "scancel"])
@pytest.mark.parametrize("now", [False, True])
def test_cancel_goes_on_where_slurm_does_not_answer(now, command, code, cluster, tmp_path, faulty, impatient):
    id = queue(tmp_path)
    running(id)
    faulty(command, code, times=2)
    liftdist("cancel", tmp_path / "run", *["--now"] * now)
    wait_for_state(id, "CANCELLED")
    assert (tmp_path / "run" / "stop-requested").exists() != now


def test_without_slurm_the_run_is_asked_to_stop_all_the_same(queued, tmp_path, faulty, impatient, monkeypatch):
    monkeypatch.setattr(cancel, "_SILENCE", 0.2)
    faulty("squeue", failing(TEMPORARY[0]), times=99999)
    code, said = call("cancel", tmp_path / "run")
    assert code == 2
    assert "liftdist: SLURM does not answer; the run is asked to save and end meanwhile\n" in said
    assert "what runs still saves and ends by itself; `liftdist cancel` waits again" in said
    assert (tmp_path / "run" / "stop-requested").exists()
    assert state_of(queued) == ["PENDING"]


def fill(folder):
    """No further file fits."""
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (folder / f"{number}").write_text("")


@pytest.mark.parametrize("how", ["gone", "no folder", "full"])
def test_a_run_directory_that_takes_no_request(how, cluster, tmp_path, small_disk, impatient):
    id = queue(small_disk, script="trap 'exit 0' USR2; sleep 1000 & wait")
    running(id)
    run_dir = small_disk / "run"
    if how == "full":
        fill(run_dir)
    elif how == "gone":
        kept = (run_dir / "jobs.jsonl").read_text()
        shutil.rmtree(run_dir)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "jobs.jsonl").write_text(kept)
        (tmp_path / "run" / "config.yaml").write_text("slurm: {signal_lead: 1}")
        run_dir = tmp_path / "run"
        (run_dir / "stop-requested").mkdir()
    else:
        (run_dir / "stop-requested").mkdir()
    said = liftdist("cancel", run_dir)
    assert "the job is sent a signal instead" in said
    assert state_of(id) in (["CANCELLED"], ["COMPLETED"])


def test_a_run_whose_directory_is_gone_is_found_by_its_command(config, tmp_path, impatient):
    liftdist("submit", config, f"run_dir={tmp_path}/lost")
    (id,) = history.job_ids(tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    assert f"job {id} is cancelled" in liftdist("cancel", tmp_path / "lost")
    assert state_of(id) == ["CANCELLED"]
    code, said = call("cancel", tmp_path / "never")
    assert (code, said) == (
        2,
        f"liftdist: {tmp_path}/never: no job was submitted for it; `squeue --me` lists your jobs, `scancel JOB` ends one\n",
    )


def test_an_interrupted_cancel_says_what_remains(cluster, tmp_path):
    id = queue(tmp_path, lead=600)
    running(id)
    command = [sys.executable, "-m", "liftdist", "cancel", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert (
            process.stdout.readline()
            == f"job {id} saves and ends, or is cancelled after 600 s; --now ends it at once\n"
        )
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == (
        f"liftdist: job {id} still saves and ends by itself; `liftdist cancel` waits again, with --now it ends at once\n"
    )
    liftdist("cancel", tmp_path / "run", "--now")
    wait_for_state(id, "CANCELLED")


def test_a_batch_script_that_is_stopped_is_ended(cluster, tmp_path, impatient):
    id = queue(tmp_path, script="kill -STOP $$")
    running(id)
    liftdist("cancel", tmp_path / "run")
    assert state_of(id) == ["CANCELLED"]


# ---------------------------------------------------------------------------------------------------------------------
# Following.


def test_a_followed_log_goes_on_through_an_outage(cluster, tmp_path, faulty):
    id = queue(tmp_path, script="exit 0")
    (tmp_path / "run" / f"slurm-{id}.out").write_text("training 1/2\n")
    wait_for_state(id, "COMPLETED")
    calls = faulty("squeue", failing(TEMPORARY[0]), times=2)
    done = run_command("logs", "-f", tmp_path / "run")
    assert (done.returncode, calls()) == (0, 3)
    assert done.stdout.splitlines() == [
        "liftdist: SLURM does not answer: squeue: Unable to contact slurm controller (connect failure); "
        "following the log all the same, Ctrl-C ends it",
        "training 1/2",
        "liftdist: SLURM answers again",
    ]


@pytest.mark.slow
def test_a_controller_that_is_stopped_and_one_that_is_killed(cluster, tmp_path):
    """Nothing but the real daemon: `logs -f` outlives both, `cancel` ends the job afterwards."""
    folder = Path(os.environ["SLURM_CONF"]).parent
    pid_file = folder / "slurmctld.pid"
    id = queue(tmp_path, script="for i in {1..600}; do echo $i; sleep 0.5; done")
    running(id)
    (tmp_path / "run" / f"slurm-{id}.out").write_text("training 1/2\n")
    command = [sys.executable, "-u", "-m", "liftdist", "logs", "-f", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "training 1/2\n"
        pid = int(pid_file.read_text())
        for stop in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(pid, stop)
            assert "SLURM does not answer: squeue: " in process.stderr.readline()
            if stop == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
            else:
                restart_controller(pid_file)
            assert process.stderr.readline() == "liftdist: SLURM answers again\n"
        assert process.poll() is None
        liftdist("cancel", tmp_path / "run")
        assert process.wait(timeout=60) == 0
    wait_for_state(id, "CANCELLED")


def restart_controller(pid_file):
    again = subprocess.Popen(
        ["slurmctld", "-D", "-f", os.environ["SLURM_CONF"]],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip
    pid_file.write_text(str(again.pid))
