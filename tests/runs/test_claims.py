"""Who may write into a run directory."""

import json
import os
import subprocess
import sys
import time

import pytest

from liftdist import files, heartbeat
from liftdist.errors import UserError
from liftdist.runs import claims, layout


def claim(run_dir):
    return claims.claim(run_dir, lambda _: {})


def claim_elsewhere(run_dir, **environment):
    """Claim in a process of its own, which then lives until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from liftdist.runs import claims\n"
        "attempt = claims.claim(Path(sys.argv[1]), lambda _: {}); print(attempt.number, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout.readline().strip().isdigit()
    return process


def test_a_live_process_keeps_its_run_and_a_dead_one_does_not(tmp_path):
    process = claim_elsewhere(tmp_path / "run", SLURM_JOB_ID="71")
    try:
        with pytest.raises(UserError, match=rf"run: in use by job slurm 71, process {process.pid} on .* \(attempt 1,"):
            claim(tmp_path / "run")
        with pytest.raises(UserError, match="in use by"):
            claims.check_free(tmp_path / "run")
    finally:
        process.kill()
    time.sleep(0.2)  # killed and not yet reaped: a zombie is dead
    assert claim(tmp_path / "run").number == 2
    process.wait()


def pretend_elsewhere(run_dir, number=1):
    """Make an attempt look as if a process of another machine had claimed it."""
    path = run_dir / "attempts" / f"attempt-{number:08d}.jsonl"
    claim_line = json.loads(path.read_text().splitlines()[0])
    claim_line["process"] |= {"machine": "another", "host": "node7"}
    path.write_text(json.dumps(claim_line) + "\n")
    return path


def test_a_claim_from_another_machine_lasts_as_long_as_its_heartbeat(tmp_path):
    run_dir = tmp_path / "run"
    claim(run_dir)
    path = pretend_elsewhere(run_dir)
    with pytest.raises(UserError, match=r"process \d+ on node7"):
        claim(run_dir)
    silent = time.time() - claims.LEASE - 1
    os.utime(path, (silent, silent))
    assert claim(run_dir).number == 2


def test_an_attempt_that_has_ended_is_no_obstacle(tmp_path):
    attempt = claim(tmp_path / "run")
    pretend_elsewhere(tmp_path / "run")
    attempt.note("end", outcome="stopped")
    assert claim(tmp_path / "run").number == 2


def test_a_requeued_job_takes_over_from_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    claim(tmp_path / "run")
    pretend_elsewhere(tmp_path / "run")
    with pytest.raises(UserError, match="in use by job slurm 5"):
        claim(tmp_path / "run")  # a second command in the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claim(tmp_path / "run").number == 2


def test_one_of_many_that_claim_at_once_gets_the_run(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from liftdist.errors import UserError; from liftdist.runs import claims\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try: claims.claim(Path(sys.argv[1]), lambda _: {}); print('mine', flush=True); time.sleep(2)\n"
        "except UserError: print('refused', flush=True)\n"
    )
    begin = str(time.time() + 1.5)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), begin], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["mine"] + ["refused"] * 3


def test_the_heartbeat_keeps_a_claim_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT", 0.05)
    attempt = claim(tmp_path / "run")
    path = tmp_path / "run" / "attempts" / "attempt-00000001.jsonl"
    os.utime(path, (0, 0))
    with attempt.heartbeat():
        time.sleep(0.3)
    assert time.time() - path.stat().st_mtime < 10
    os.utime(path, (0, 0))
    time.sleep(0.2)
    assert path.stat().st_mtime == 0  # it ends with the block


def test_a_damaged_claim_is_an_error_and_a_damaged_event_is_left_out(tmp_path):
    attempt = claim(tmp_path / "run")
    path = tmp_path / "run" / "attempts" / "attempt-00000001.jsonl"
    with path.open("a") as file:
        file.write('{"event": "comm')  # the disk was full
    attempt.note("end", outcome="failed")
    assert [event["event"] for event in claims.attempts(tmp_path / "run")[1]] == ["claim", "end"]
    path.write_text(path.read_text()[3:])
    with pytest.raises(UserError, match=r"attempt-00000001.jsonl: damaged: .*--fresh starts again"):
        claim(tmp_path / "run")


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and holds no run"):
        claims.check_free(tmp_path)
    with pytest.raises(UserError, match="exists and holds no run"):
        claims.check_free(tmp_path / "file")
    (tmp_path / "file").unlink()
    for name in ("eval", "tensorboard"):  # of a model that was asked there
        (tmp_path / name).mkdir()
        claims.check_free(tmp_path)
        (tmp_path / "attempts").rmdir()


def test_symbolic_links_inside_a_run_directory_are_not_followed(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    for name in ("attempts", "checkpoints", "tensorboard"):
        (run_dir / "attempts").mkdir(exist_ok=True)
        if name == "attempts":
            (run_dir / name).rmdir()
        (run_dir / name).symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"{name}: is not a folder; symbolic links inside a run directory are not"):
            claims.check_free(run_dir)
        (run_dir / name).unlink()
    assert not any(elsewhere.iterdir())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        files.open_to_append(link)
    files.write(link, "new")  # takes the name; what it pointed to stays as it was
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("precious", "new", False)


def test_a_request_to_stop_for_an_earlier_attempt_is_forgotten(tmp_path):
    claim(tmp_path / "run").note("end", outcome="failed")
    request = tmp_path / "run" / layout.STOP_REQUESTED
    request.touch()
    claim(tmp_path / "run").note("end", outcome="failed")
    assert request.exists()  # it came while this process was alive: it is meant
    os.utime(request, (0, 0))
    claim(tmp_path / "run")
    assert not request.exists()
