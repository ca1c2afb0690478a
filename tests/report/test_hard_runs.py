"""Pages of runs to which much has happened: real ones, of small models."""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path

import builders
import commands
import hooks
import pytest
import ranks

from liftdist import config as configs
from liftdist.report import compare, page, read
from liftdist.training import objective, trainer

NAME = '<img src=x onerror=alert(1)> & "more" $x^{2$'
SKIPPED, DIES, STEPS = 4, 6, 9


def shown(run_dir, seconds=30):
    return page.render(read.read_all([Path(run_dir)]), seconds=seconds)


def go_through_it(mesh, path, run_dir, died):
    """A step whose gradient is not finite, a crash, and a restart; the page of the run as it goes on. Another ends at once."""
    config, text = configs.load(path, [configs.override("run_dir", run_dir)])
    now = []

    def before_step(made):
        now[:] = [made.step + 1]
        if made.step + 1 == DIES and not pages:
            pages.append(shown(config.run_dir))
            raise RuntimeError("<b>the machine</b> is on fire")

    def spoiled(loss, *_):
        return loss * math.nan if now == [SKIPPED] else loss

    pages = []
    with (
        hooks.around(trainer.Trainer, "run_step", before=before_step),
        hooks.around(objective, "token_losses", after=spoiled),
    ):
        with contextlib.suppress(RuntimeError):
            builders.run_once(mesh, config, text)
        assert builders.run_once(mesh, config, text) == "finished"
    config, text = configs.load(path, [configs.override("run_dir", died), "eval.tasks.0.max_new_tokens=600"])
    builders.run_once(mesh, config, text)
    return pages[0]


@pytest.fixture(scope="module")
def hard(tiny_model, tmp_path_factory):
    """The page of a run that goes on, and its folder at the end."""
    folder = tmp_path_factory.mktemp("hard")
    records = builders.write_records(folder / "records.jsonl")
    questions = [{"prompt": f"<script>alert({n})</script>", "completion": f" {n}</b>"} for n in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    of = dict(path=str(folder / "questions.jsonl"))
    said = dict(name="said", scorer="contains", max_new_tokens=4, **of)
    likely = dict(name="likely", kind="perplexity", **of)
    path = commands.write_config(
        folder, tiny_model, records,
        train=dict(steps=STEPS, export=False, eval_kl=True), checkpoint=dict(interval=2, keep=9),
        selection=dict(refresh_interval=3), eval=dict(tasks=[said, likely], interval=4),
    )  # fmt: skip
    (going,) = ranks.run(1, go_through_it, path, str(folder / NAME), str(folder / "died"))
    return going, folder / NAME


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html[html.index("<h1>") :]))


def test_a_run_that_goes_on_has_a_page(hard):
    text = text_of(hard[0])
    assert "still running, after step 5" in text
    assert "skipped steps 4" in text
    assert "What changed in the weights, up to step 2" in text


def test_a_run_that_was_restarted_has_a_page(hard):
    html = shown(hard[1])
    text = text_of(html)
    assert "finished, after step 9" in text
    assert "failed: RuntimeError: &lt;b&gt;the machine" in text
    assert "skipped steps 4" in text
    for title in (
        "Weights that survive a refresh",
        "attempt 2",
        "skipped step",
        "Kept since step 2",
        "Singular values",
    ):
        assert title in text
    assert re.search(
        r"likely perplexity [\d.]+ \[[\d., ]+\] [\d.]+ \[[\d., ]+\] 9 -?[\d.]+ \[[-\d., ]+\] [\d.e-]+ 5 ", text
    )
    assert not re.search(r"<(script|img|b)\b", html)
    assert "&lt;script&gt;alert(0)" in html
    run = read.read(hard[1])
    assert run.curves["train/loss"].steps.tolist() == list(range(1, STEPS + 1))
    assert [figure.step for figure in run.evaluations["likely", "perplexity"]] == [0, 4, 8, 9]
    assert {key for key in run.changed if key.startswith("eval.tasks.1.")} == {
        f"eval.tasks.1.{name}" for name in ("name", "kind", "path")
    }
    assert "data.sources" not in run.changed
    assert [attempt.outcome for attempt in run.attempts] == ["failed", "finished"]


def test_five_runs_have_a_page_and_a_table(hard, reported, tmp_path):
    """The same one several times, one that died at once, and one without tasks."""
    _, run_dir = hard
    copies = [shutil.copytree(run_dir, tmp_path / name) for name in ("b", "c")]
    runs = read.read_all([run_dir, *copies, run_dir.parent / "died", reported])
    text = text_of(page.render(runs))
    assert "failed: UserError: eval.tasks.0: the longest prompt" in text
    assert text.count("finished, after step 9") == 3
    rows = {row.name: row for row in compare.rows(runs)}
    assert rows["likely, perplexity"].best == {0, 1, 2}
    assert rows["likely, perplexity change"].cells[3:] == ["", ""]
    assert rows["state"].cells == ["finished", "finished", "finished", "failed", "finished"]
    assert len({len(row.cells) for row in rows.values()}) == 1
