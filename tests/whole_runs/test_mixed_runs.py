"""Runs on several sources as a user starts them: what they print and record, how they continue, what is refused."""

import json

import builders
import pytest
import ranks
import yaml
from commands import call, run_command, user_error, write_config

from liftdist import config as configs
from liftdist import hub
from liftdist.data_settings import EvalSourceConfig, SourceConfig
from liftdist.runs import changes, checkpoint
from liftdist.runs.manifest import Provenance
from liftdist.runs.saver import Checkpointer, Saved
from liftdist.schema_tree import COURSE, NOTHING
from liftdist.training import inputs


def write_sources(folder):
    """Two files of 40 and 15 records."""
    records = builders.write_records(folder / "sums.jsonl")
    lines = [json.dumps({"text": f"{number} squared is {number**2}"}) for number in range(15)]
    (folder / "squares.jsonl").write_text("\n".join(lines))
    return records, folder / "squares.jsonl"


def write_mixture(folder, model, first=None, second=None, **data):
    """A config with both sources."""
    paths = write_sources(folder)
    entries = [{"path": str(path)} | (more or {}) for path, more in zip(paths, (first, second), strict=True)]
    return write_config(folder, model, paths[0], data=dict(path=None, eval_path=None, sources=entries) | data)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_says_what_it_takes_of_each_source_and_records_the_loss_of_each(tiny_model, tmp_path):
    config = write_mixture(tmp_path, tiny_model, dict(weight=1), dict(weight=3, name="n2"), eval_share=0.2)
    run = run_command("train", config, "--nproc", 2, "train.export=false")
    assert run.returncode == 0, run.stdout
    assert f"data {tmp_path}/sums.jsonl: 40 samples" in run.stdout
    assert f"data {tmp_path}/sums.jsonl: 8 samples are held out, 32 are left to train on" in run.stdout
    assert f"data {tmp_path}/squares.jsonl: 3 samples are held out, 12 are left to train on" in run.stdout
    assert "source sums: 32 samples, an epoch takes 11 (0.344 passes)" in run.stdout
    assert "source n2: 12 samples, an epoch takes 33 (2.75 passes)" in run.stdout
    lines = lines_of(tmp_path)
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]
    for line in evaluations:
        of_sets = sorted([line["eval/sums/loss"], line["eval/n2/loss"]])
        assert of_sets[0] < line["eval/loss"] < of_sets[1]
    assert all("train/n2/loss" in line for line in steps)
    assert any("train/sums/loss" in line for line in steps)
    for line in steps:
        of_sources = [line[tag] for tag in ("train/sums/loss", "train/n2/loss") if tag in line]
        assert min(of_sources) - 1e-6 <= line["train/loss"] <= max(of_sources) + 1e-6
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/n2/loss", "eval/n2/loss", "eval/sums/loss", "eval/loss"} <= set(events.Tags()["scalars"])
    for override, problem in (  # of the finished run
        ("data.eval_share=0.1", "data.eval_share: 0.2 -> 0.1"),
        ("data.eval_share=", "data.eval_share: 0.2 -> None"),
        ("data.sources.1.weight=2", "data.sources.1.weight: 3.0 -> 2.0"),
        ("data.sources.0.path=" + str(tmp_path / "squares.jsonl"), "data.sources.0.path:"),
    ):
        code, said = call("train", config, "--nproc", 1, "train.export=false", override)
        assert (code, problem in said) == (2, True), said
        assert "; --allow-changes continues with the new ones" in said
    squares = tmp_path / "squares.jsonl"
    squares.write_text(squares.read_text() + '\n{"text": "one more"}\n')
    grown = run_command("train", config, "--nproc", 1, "train.export=false")
    assert "data.sources: the contents have changed" in user_error(grown)


SOURCES = {
    "weights": (dict(weight=1.0), dict(weight=3.0)),
    "numbers of samples": (dict(samples=50), dict(samples=4)),
}


def stopped(mesh, config, run_dir, stops):
    """Save after every step of a run; continue from those in ``stops``. Collective."""
    attempt = builders.claimed_by_all(mesh, run_dir)
    trainer = builders.trainer(mesh, config)
    saver = Checkpointer(attempt, mesh, 100, None)
    figures, digests = [], []
    for _ in range(config.train.steps):
        figures.append(losses_of(trainer.run_step()))
        digests.append(builders.global_digest(trainer))
        assert isinstance(builders.save(trainer, saver), Saved)
    resumed = []
    for step in stops:
        trainer = builders.trainer(mesh, config, checkpoint.open_step(run_dir / f"checkpoints/step-{step:08d}"))
        more = [losses_of(trainer.run_step()) for _ in range(config.train.steps - step)]
        resumed.append((more, builders.global_digest(trainer)))
    return figures, digests, resumed


def losses_of(figures):
    return {tag: value for tag, value in figures.items() if tag.endswith("loss")}


def continued(mesh, config, folder):
    """The losses after the checkpoint of another number of ranks. Collective."""
    step = checkpoint.open_step(folder / "checkpoints" / "step-00000003")
    trainer = builders.trainer(mesh, config, step)
    return [losses_of(trainer.run_step()) for _ in range(config.train.steps - 3)]


@pytest.mark.parametrize(("mix", "packing"), [("weights", True), ("numbers of samples", False)])
def test_a_run_continues_to_the_bit_in_the_middle_of_an_epoch(mix, packing, tiny_model, tmp_path):
    paths = write_sources(tmp_path)
    entries = [SourceConfig(path=str(path), **more) for path, more in zip(paths, SOURCES[mix], strict=True)]
    sections = builders.SETTINGS | dict(
        data=dict(path=None, sources=entries, eval_share=0.1, packing=packing),
        train=builders.SETTINGS["train"] | dict(steps=12),
    )
    config = builders.config(tiny_model, paths[0], tmp_path, **sections)
    stops = (3, 10)  # an epoch has 49 and 54 samples, a step six sequences
    for figures, digests, resumed in ranks.run(2, stopped, config, tmp_path / "run", stops):
        assert len(set(digests)) == 12
        for step, run in zip(stops, resumed, strict=True):
            assert run == (figures[step:], digests[-1])
    for found in ranks.run(3, continued, config, tmp_path / "run"):
        for step, expected in zip(found, figures[3:], strict=True):
            assert step == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (['{"text": 5}'], "squares.jsonl:1: 'text' must be text, got int"),
        (['{"text": "a"}'] * 500 + ['{"txet": "a"}'], "squares.jsonl:501: field 'text' is missing"),
        (['{"some": "a"}'], "squares.jsonl:1: fields some fit no format"),
        (['{"prompt": "a", "completion": "b"'], "squares.jsonl:1: not JSON"),
        ([], "squares.jsonl: holds no record"),
    ],
)
def test_the_first_records_of_every_source_are_checked_before_ranks_start(wrong, said, tiny_model, tmp_path):
    config = write_mixture(tmp_path, tiny_model)
    (tmp_path / "squares.jsonl").write_text("\n".join(wrong))
    for words in (("train", config, "--nproc", 2), ("train", config, "--nproc", 2, *HELD_OUT(tmp_path))):
        code, found = call(*words)
        assert (code, said in found) == (2, True), found
        assert len(found.splitlines()) == 1


def HELD_OUT(folder):
    """The second source as a held-out set instead."""
    return (
        f"data.sources=[{{path: {folder}/sums.jsonl}}]",
        f"data.eval_sources=[{{path: {folder}/sums.jsonl}}, {{path: {folder}/squares.jsonl}}]",
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sources.1.format=alpaca"], "field 'instruction' is missing"),
        (["data.sources.1.fields={text: body}"], "field 'body' (data.sources.1.fields.text) is missing"),
        (["data.sources.1.fields={txet: body}"], "data.sources.1.fields.txet: is no field of formats"),
        (["data.sources.1.prompt_template={body", "data.sources.1.response_template={text}"], "1.prompt_template: {"),
        (["data.sources.1.prompt_template={text}", "data.sources.1.response_template=x"], "sources.1.response_template: has"),
        (["data.sources.1.prompt_template={text}", "data.sources.1.response_template={b}"], "field 'b' of data.sources.1.resp"),
        (["data.sources.1.path=none.jsonl"], "data none.jsonl: no such file"),
        (["data.sources.1.subset=x"], "has no subset x"),
        (["data.sources.1.split=dev"], "has no splits"),
        (["data.sources.1.revision=v1"], "is a local file, which has no revision v1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_source_names_its_settings(overrides, said, tiny_model, tmp_path):
    code, found = call("train", write_mixture(tmp_path, tiny_model), "--nproc", 2, *overrides)
    assert (code, said in found) == (2, True), found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}], {},
         "squares.jsonl: nothing to learn: of 1 records 1 left out: nothing to learn in them (1)"),
        ([{"prompt": "a " * 90, "completion": "b"}], {}, "squares.jsonl: nothing to learn: of 1 records"),
        ([{"text": "once"}], dict(eval_share=0.5), "squares.jsonl (1 different records) leaves nothing to train on"),
        ([{"text": "a"}], dict(weights=(1e6, 1)), "data.sources.1.weight: 1.0 of 1e+06 is less than one of the 41 samples"),
    ],
    ids=["no reply", "cut off", "held out", "no share"],
)  # fmt: skip
def test_a_source_that_gives_nothing_is_refused_by_name(lines, settings, said, tiny_model, tmp_path):
    weights = settings.pop("weights", None)
    entries = [dict(weight=weight) for weight in weights] if weights else [None, None]
    config = write_mixture(tmp_path, tiny_model, *entries, **settings)
    (tmp_path / "squares.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = call("select", config, "--prefetch")
    assert (code, said in found) == (2, True), found


def test_a_job_is_refused_for_a_record_of_its_second_source(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "because"}]
    config = write_mixture(tmp_path, tiny_model)
    (tmp_path / "squares.jsonl").write_text(json.dumps({"messages": turns}))
    code, said = call("submit", config)
    assert code == 2
    assert f"{tmp_path}/squares.jsonl:1: the chat template drops reasoning_content of message 2" in said


# ---------------------------------------------------------------------------------------------------------------------
# What has changed.

TREE = {
    "model": {"path": "m"},
    "data": {"path": None, "sources": [{"path": "O/d", "weight": 1.0}, {"path": "O/e", "weight": 2.0}]},
}
OLD, NEW = "1" * 40, "2" * 40
AT = {"data.sources.0.path": f"O/d@{OLD}", "data.sources.1.path": f"O/e@{OLD}"}


def changed(tree=None, **changes):
    before = dict(config=yaml.safe_dump(TREE), from_environment={}, base="1", data="1", commits=AT)
    return changes_of(before, before | changes | ({"config": yaml.safe_dump(tree)} if tree else {}))


def changes_of(before, after):
    return changes.between(Provenance(**before), Provenance(**after))


def with_sources(*entries, **data):
    return TREE | {"data": TREE["data"] | dict(sources=list(entries)) | data}


FIRST, SECOND = TREE["data"]["sources"]
MOVED = f"the run used commit {OLD} of O/e, and finds {NEW} now; data.sources.1.revision={OLD} continues with the earlier one"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (changed(), []),
        (changed(data="2"), [(COURSE, "data.sources: the contents have changed")]),
        (changed(data="2", commits=AT | {"data.sources.1.path": f"O/e@{NEW}"}),
         [(COURSE, f"data.sources.1.path: the contents have changed: {MOVED}")]),
        (changed(commits=AT | {"data.sources.1.path": f"O/e@{NEW}"}),
         [(NOTHING, f"data.sources.1.path: the samples are equal: {MOVED}")]),
        (changed(with_sources(FIRST), data="2", commits={}),
         [(COURSE, "data.sources.1.path: O/e -> absent"), (COURSE, "data.sources.1.weight: 2.0 -> absent")]),
        (changed(with_sources(FIRST, SECOND | {"turns": None})), []),  # a setting that an earlier version did not know
        (changed(with_sources(FIRST, SECOND | {"name": "x"})), []),
        (changed(with_sources(FIRST, SECOND | {"weight": 3.0}), data="2"), [(COURSE, "data.sources.1.weight: 2.0 -> 3.0")]),
        (changed(with_sources(FIRST, SECOND, eval_sources=[{"path": "x"}])),
         [(NOTHING, "data.eval_sources.0.path: absent -> x")]),
    ],
    ids=["same", "contents", "moved", "moved, equal", "fewer", "new setting", "new name", "weight", "held out"],
)  # fmt: skip
def test_changes_of_sources(found, expected):
    assert found == expected


def test_the_commit_of_every_source_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("LIFTDIST_COMMITS", raising=False)
    hub.adopt({"model O/m@main": NEW, "dataset O/d@main": OLD, "dataset O/d@v2": NEW, "dataset O/e@main": OLD})
    config = builders.config(
        "O/m", "", tmp_path,
        data=dict(
            path=None,
            sources=[
                SourceConfig(path="O/d"),
                SourceConfig(path="hf://datasets/O/d/x.csv", revision="v2"),
                SourceConfig(path="a.csv"),
            ],
            eval_sources=[EvalSourceConfig(path="O/e")],
        ),
    )  # fmt: skip
    assert inputs.commits(config) == {
        "model.path": f"O/m@{NEW}", "data.sources.0.path": f"O/d@{OLD}", "data.sources.1.path": f"O/d@{NEW}",
        "data.eval_sources.0.path": f"O/e@{OLD}",
    }  # fmt: skip
    assert inputs.commits(config, training=False) == {"model.path": f"O/m@{NEW}"}
    monkeypatch.delenv("LIFTDIST_COMMITS", raising=False)


def test_a_mixture_reads_back_from_what_is_kept_of_it(tiny_model, tmp_path):
    config, text = configs.load(
        write_mixture(tmp_path, tiny_model, dict(samples=3, fields={"text": "text"}), eval_share=0.1)
    )
    (tmp_path / "again.yaml").write_text(text)
    assert configs.load(tmp_path / "again.yaml") == (config, text)
    assert changes.of_settings(text, text) == []
