"""The history of a run's jobs, where lines are cut, of another version, or of somebody else."""

import json

import pytest
from commands import call

from liftdist import config as configs
from liftdist.cluster import history, job

START = dict(job="7", start="0.0", family="7")


@pytest.fixture
def run_dir(tmp_path):
    """A run whose only job started and was requeued."""
    history.note(tmp_path, "submit", job="7", array=None, log=str(tmp_path / "logs"))
    history.note(tmp_path, "start", **START, nodes=["n0", "n1"], step=0, log="/logs/slurm-7.out")
    history.note(
        tmp_path, "end", **START, cause="node failure", action="requeue", step=3, message="lost n1", exclude=["n1"]
    )
    return tmp_path


def whole(run_dir):
    return [json.loads(line) for line in (run_dir / history.JOBS).read_text().splitlines() if line]


def damage(event):
    """The line of an event, damaged in every way that is still a line."""
    for name in set(event) - {"exclude", "array"}:
        yield json.dumps({key: value for key, value in event.items() if key != name})
        yield json.dumps(event | {name: {"of": "another version"}})
    yield from (
        "12",
        "null",
        "[]",
        '"start"',
        "{}",
        '{"event": []}',
        '{"event": "unheard of", "job": "7", "time": 1}',
        "\x00",
    )
    yield json.dumps(event)[:-3]
    yield json.dumps(event | {"job": "--all"})
    yield json.dumps(event | {"job": "7,8"})
    yield json.dumps(event | {"time": float("nan")})
    yield json.dumps(event | {"time": 1e300})
    yield json.dumps(event | {"nodes": [1], "exclude": [None]})


def test_what_is_no_event_is_left_out(run_dir):
    events = whole(run_dir)
    assert history.read(run_dir) == events
    lines = [line for event in events for line in damage(event)]
    assert len(lines) > 60
    with (run_dir / history.JOBS).open("ab") as file:
        file.write("\n".join(lines).encode() + b"\n\xff\xfe\n" + json.dumps(events[1]).encode()[:40])
    assert history.read(run_dir) == events
    history.note(run_dir, "start", **START, nodes=[], step=0, log=None)  # after a line that was cut short
    assert [event["event"] for event in history.read(run_dir)] == ["submit", "start", "end", "start"]


def test_the_commands_bear_what_is_no_event(run_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # there is no SLURM to ask
    _, before = call("status", run_dir)
    assert "start    7-0.0  " in before
    assert ": lost n1; requeued without n1\n" in before
    with (run_dir / history.JOBS).open("a") as file:
        file.write("\n".join(line for event in whole(run_dir) for line in damage(event)))
    figures = [12, [], {"train/loss": 1}, {"step": 7, "train/loss": None}, {"step": 8, "train/loss": "x"}, {"step": 9}]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, figures)))
    for text in ("train: 3", "[]", "", "train: {steps: many}", "train: {steps: [", "\x00"):
        (run_dir / "config.yaml").write_text(text)
        code, said = call("status", run_dir)
        assert (code, said) == (0, f"{before}step     8  loss nan  nan tokens/s\n")
    history.note(run_dir, "end", **START, cause=None, action="fail", step=3, message="")
    assert ": ; given up\n" in call("status", run_dir)[1]


def test_a_job_decides_by_whole_events_alone(run_dir):
    """A budget of one requeue, which the damaged copies of that event do not spend again."""
    config, _ = configs.load(configured(run_dir))
    with (run_dir / history.JOBS).open("a") as file:
        file.write("\n".join(damage(whole(run_dir)[-1])))
    events = history.read(run_dir)
    assert history.refusal(config, events, "7", history.NODE_FAILURE, 4) is None
    assert "as often as slurm.max_requeues allows" in history.refusal(
        config, [*events, events[-1]], "7", history.NODE_FAILURE, 4
    )


def configured(run_dir):
    path = run_dir / "config.yaml"
    path.write_text(
        "run_dir: x\nmodel: {path: x}\ndata: {path: x}\nselection: {density: 0.1}\nslurm: {max_requeues: 2}\n"
    )
    return path


def test_claims_of_another_version_decide_nothing(run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempts = run_dir / "attempts"
    attempts.mkdir()
    claim = {"event": "claim", "attempt": 1, "job": {"id": "slurm 7", "time": "0.0"}}
    end = {"event": "end", "outcome": "stopped"}
    commit = {"event": "commit", "step": 4}
    for first, others, expected in (
        (claim, [end], "stopped"),
        (claim, [12, [], {"event": "end"}], None),
        (claim | {"job": "slurm 7"}, [end], None),
        (claim | {"job": {"id": "slurm 7"}}, [end], None),
    ):
        lines = [first, commit, {"event": "commit"}, {"event": "commit", "step": "9"}, *others]
        (attempts / "attempt-00000001.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert job._outcome(run_dir, START) == expected
        assert history.committed_step(run_dir) == 4


def test_a_history_that_cannot_be_read_is_one_line(run_dir):
    (run_dir / history.JOBS).unlink()
    assert history.read(run_dir) == []
    (run_dir / history.JOBS).mkdir()
    code, said = call("submit", configured(run_dir), f"run_dir={run_dir}")
    assert (code, said) == (2, f"liftdist: {run_dir}/jobs.jsonl: Is a directory\n")
