"""Pages and tables of runs: real ones, broken ones, hostile ones, and several."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import commands
import pytest

from liftdist.processes import this_process
from liftdist.report import compare, page, read


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "run")


def made(*run_dirs):
    return Page(page.render(read.read_all(run_dirs)))


def claim(run_dir, number, *events, **fields):
    """The file of an attempt by this process."""
    first = {
        "event": "claim",
        "attempt": number,
        "time": 1000.0,
        "process": this_process(),
        "accepts": {},
        "nonce": "",
        "job": None,
    }
    path = run_dir / "attempts" / f"attempt-{number:08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in (first | fields, *events)))
    return path


def test_a_page_shows_what_ran_and_loads_nothing(reported):
    shown = made(reported)
    for text in ("finished, after step 8", "2: dp_replicate 1, dp_shard 2", "selection.density", "0.05", "2, 4, 6, 8"):
        assert text in shown.text
    titles = ("Loss", "Learning rate", "Gradient norm", "Throughput", "survive a refresh", "Time by phase", "by rank")
    for title in titles:
        assert title in shown.text
    assert sum(tag == "svg" for tag, _ in shown.tags) == len(titles) + 1  # and the attempts
    for tag, attributes in shown.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_curves_are_those_of_the_metrics(reported):
    run = read.read(reported)
    lines = [json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert dict(zip(run.curves["train/loss"].steps, run.curves["train/loss"].values, strict=True)) == losses
    assert [step for _, step in run.attempts[0].saves] == [2, 4, 6, 8]
    assert sorted(run.memory) == [0, 1]
    assert run.changed["train.batch_size"] == 6
    assert "selection.criterion" not in run.changed


def test_of_several_entries_of_a_step_the_last_counts(run_dir):
    lines = [{"step": step, "time": 1.0, "train/loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0), (1, 2.0))]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read.read(run_dir).curves["train/loss"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2], [2.0, 3.0])


def test_metrics_that_were_not_finite_or_cut_short_are_gaps(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "train/loss" in line:
            line["train/skipped_steps"] = int(line["step"] >= 4) + int(line["step"] >= 5)
            line["train/loss"] = None if line["step"] == 4 else line["train/loss"]
    lines.append({"step": 7, "time": 1.0, "checkpoint/failed": 1.0})
    lines.append({"step": float("nan"), "train/loss": 1.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '[1]\n{"step": 9, "train/lo')
    run = read.read(run_dir)
    assert (run.step, run.skipped, run.failed_saves) == (8, [4, 5], [7])
    assert "skipped steps4, 5" in made(run_dir).text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("stopped", "stopped: SIGTERM"),
        ("failed", "failed: OutOfMemoryError: 80 GiB"),
        ("running", "still running"),
        ("vanished", "ended without a word"),
    ],
)
def test_a_page_says_how_each_attempt_ended(run_dir, kind, said):
    ends = {"stopped": "SIGTERM", "failed": "OutOfMemoryError: 80 GiB"}
    events = [{"event": "end", "time": 1090.0, "outcome": kind, "reason": ends[kind]}] if kind in ends else []
    path = claim(run_dir, 2, *events)
    with path.open("a") as file:
        file.write('\n{"event": "com')
    if kind == "vanished":
        os.utime(path, (1090, 1090))
    shown = made(run_dir).text
    assert f"{said}" in shown
    assert "finished" in shown  # the first
    if kind != "running":
        assert "1 min 30 s" in shown


def test_an_attempt_that_another_followed_is_over(tmp_path):
    claim(tmp_path / "run", 1)  # its heartbeat is of now, as that of a copy
    claim(tmp_path / "run", 2, {"event": "end", "time": 1090.0, "outcome": "finished"}, time=1030.0)
    first, second = read.read(tmp_path / "run").attempts
    assert (first.outcome, first.begin, first.end) == ("vanished", 1000, 1030)
    assert (second.outcome, second.begin, second.end) == ("finished", 1030, 1090)


def test_a_run_that_died_at_once_has_a_page(tmp_path):
    claim(
        tmp_path / "run", 1, {"event": "end", "time": 1003.0, "outcome": "failed", "reason": "UserError: no such file"}
    )
    shown = made(tmp_path / "run").text
    assert "failed: UserError: no such file, after step 0" in shown
    assert "There are no metrics" in shown


def test_causes_of_jobs_are_shown(run_dir):
    start = dict(job="17", start="1", family="17", step=4, time=1000.0)
    end = dict(event="end", action="requeue", cause="preempted", message="the job was preempted", **start)
    (run_dir / "jobs.jsonl").write_text(json.dumps(end) + "\n")
    shown = made(run_dir).text
    assert "preemptedrequeuethe job was preempted" in shown
    assert "job ended: preempted" in shown  # on the time axis


def test_what_another_version_wrote_differently_is_left_out(run_dir):
    (run_dir / "environment.json").write_text('{"mesh": {"tp": "x"}, "packages": []}')
    (run_dir / "config.yaml").write_text("model: {path: there}\nnot_known: 3\n")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": "high"}\n')
    (run_dir / "eval.jsonl").write_text(
        '{"step": 1, "task": "sums", "metric": "accuracy", "value": 0.5}\n{"step": 2}\n'
    )
    shown = made(run_dir)
    assert "sumsaccuracynotasked0.5001" in re.sub(r"\s", "", shown.text)
    assert "ranks" not in shown.text
    assert "not_known" in shown.text


def test_names_and_answers_are_text(reported, tmp_path, with_answers):
    hostile = "<script>alert(1)"
    run_dir = shutil.copytree(reported, tmp_path / hostile)
    with_answers(run_dir, [0, 1], [1, 0], task="<img src=x onerror=alert(1)>", text=f"{hostile}</script>\u202e")
    other = shutil.copytree(reported, tmp_path / "$x_{1$ & 'y'")
    text = page.render(read.read_all([run_dir, other]))
    shown = Page(text)
    assert not [tag for tag, _ in shown.tags if tag in ("script", "img")]
    assert shown.text.count(f"{hostile}</script>\\u202e 8") == 2
    assert hostile in shown.text
    assert "\u202e" not in text
    assert "$x_{1$ & 'y'" in shown.text


def test_answers_that_changed_are_shown(run_dir, with_answers):
    with_answers(run_dir, [0, 0, 0, 1, 1], [1, 1, 0, 0, 1])
    shown = made(run_dir).text
    assert "Became right, or better: 2" in shown
    assert "Became wrong, or worse: 1" in shown
    assert (
        "step 0 against step 8: p = 1 for the difference, by 5 questions" in shown
    )  # 2 better, 1 worse: 2 (1 + 3) / 8
    assert "1 + 3? two" in shown
    assert "1 + 2? two" not in shown


def test_a_score_stands_beside_that_of_the_base_model(run_dir, with_answers):
    with_answers(run_dir, [0] * 8 + [1] * 2, [1] * 9 + [0])  # 8 better, 1 worse: 2 (1 + 9) / 2^9
    shown = re.sub(r"\s+", " ", made(run_dir).text)
    assert re.search(
        r"accuracy 0.200 \[0.000, 0.500\]0.900 \[0.700, 1.000\]8 0.700 \[0.300, 1.000\]0.039 10", shown
    )  # 2 (1 + 9) / 2^9
    path = run_dir / "eval.jsonl"
    path.write_text("".join(line for line in path.open() if json.loads(line)["step"]))  # begun without the task
    assert "accuracy not asked0.900" in re.sub(r"\s+", " ", made(run_dir).text)


def test_answers_that_are_cut_within_a_character_or_hold_odd_line_ends_are_read(run_dir, with_answers):
    with_answers(run_dir, [0, 0], [1, 1], text="a\u2028b")
    path = run_dir / "eval" / "sums" / "step-00000008.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    torn = '{"id": 2, "answer": "é'.encode()[:-1]
    path.write_bytes("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode() + torn)
    assert [*read.read(run_dir).answers["sums"][8]] == [0, 1]


def test_less_of_some_metrics_is_better(reported, tmp_path):
    runs = [shutil.copytree(reported, tmp_path / name) for name in ("a", "b")]
    metrics = {"perplexity": 1, "perplexity_change": 1, "kl_to_base": 1, "accuracy": 0, "accuracy_change": 0}
    metrics |= {"word_perplexity": 1, "bits_per_byte": 1, "ter": 1, "exact_match": 0}
    for run_dir, value in zip(runs, (7.5, 6.5), strict=True):
        lines = [{"step": 8, "task": "news", "metric": metric, "value": value} for metric in metrics]
        (run_dir / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare.rows(read.read_all(runs))[-len(metrics) :]
    assert rows[0] == compare.Row("news, perplexity", ["7.500", "6.500"], frozenset({1}))
    assert [row.best for row in rows] == [{best} for best in metrics.values()]


def test_runs_are_compared_by_their_questions(reported, tmp_path, with_answers):
    names = ["a", "b", "c", "d", "e"]
    runs = [shutil.copytree(reported, tmp_path / name) for name in names]
    for number, run_dir in enumerate(runs[:4]):
        with_answers(run_dir, [0] * 8, [1] * (8, 2, 7, 8)[number] + [0] * (0, 6, 1, 0)[number])
    row = next(row for row in compare.rows(read.read_all(runs)) if row.name == "sums, accuracy")
    surely, rarely, mostly = "1.000 [1.000, 1.000]", "0.250 [0.000, 0.625]", "0.875 [0.625, 1.000]"
    assert row.cells == [surely, rarely, mostly, surely, ""]
    assert row.best == {0, 3}
    assert row.note == (
        "against b significant, p = 0.031 (8 questions); against c not significant, p = 1 (8 questions); "  # 2 / 2^6
        "against d not significant, p = 1 (8 questions)"
    )
    changes = next(row for row in compare.rows(read.read_all(runs)) if row.name == "sums, accuracy change")
    assert changes.cells[:2] == row.cells[:2]  # from 0
    assert changes.note.startswith(
        "a significant, p = 0.0078; b not significant, p = 0.5; c significant, p = 0.016; d "
    )
    lines = commands.liftdist("compare", *runs).splitlines()
    assert lines[0].split() == names
    scores = next(line for line in lines if line.startswith("sums, accuracy"))
    assert scores.count(f"{surely} *") == 2
    assert sum(tag == "svg" for tag, _ in made(*runs).tags) == 5 + 1 + 5 * 3


def test_runs_of_one_name_are_told_apart_by_their_paths(reported, tmp_path):
    other = shutil.copytree(reported, tmp_path / "run")
    assert read.names(read.read_all([reported, other])) == [str(reported), str(other)]


def test_what_cannot_be_reported_is_refused(reported, tmp_path):
    (tmp_path / "mine.html").write_text("<html>")
    (tmp_path / "empty").mkdir()
    for words, problem in (
        ([tmp_path / "nowhere"], "no such run directory"),
        ([tmp_path / "empty"], "is not a run directory"),
        ([reported, reported], "is given twice"),
        ([reported, "--output", tmp_path / "mine.html"], "is no page of `liftdist report`; give another --output"),
        ([reported, "--output", tmp_path / "no" / "r.html"], "does not exist; create it first"),
    ):
        assert problem in commands.liftdist("report", *words, code=2)


def test_a_page_is_written_again_over_one(reported, tmp_path):
    output = tmp_path / "report.html"
    assert commands.liftdist("report", reported, "--output", output) == f"{output}\n"
    first = output.read_text()
    commands.liftdist("report", reported, reported.parent / "run", "--output", output, code=2)
    assert output.read_text() == first
    commands.liftdist("report", reported, "--output", output)
    assert output.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_library_that_is_not_there_is_named(library, tmp_path):
    claim(tmp_path / "run", 1)
    code = (
        f"import sys; sys.modules[{library!r}] = None; from liftdist import cli\n"
        f"cli.main(['compare', {str(tmp_path / 'run')!r}]); assert 'torch' not in sys.modules\n"
        f"cli.main(['report', {str(tmp_path / 'run')!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "pip install 'liftdist[report]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
