"""Runs that share a model: each learns, to the bit, what it learns by itself, however they are stopped and continued."""

import json

import builders
import hooks
import pytest
import ranks
from commands import write_config

from liftdist import config as configs
from liftdist.errors import Stopped, UserError
from liftdist.runs import claims
from liftdist.runs.stop import StopRequests
from liftdist.training import trainer
from liftdist.training.run import train, train_all

VARIANTS = {
    "low": "optimizer.lr=1e-3 train.eval_kl=true checkpoint.interval=2",
    "other_data": "data.path={records} train.seed=4 train.steps=7 train.loss=asft train.kl_weight=0.3",
    "sgd": "optimizer.name=sgd optimizer.lr=0.05 selection.criterion=magnitude selection.density=0.08 train.batch_size=4",
}


def written(tmp_path, smollm2, dtype="float32"):
    """A config of three variants, which refresh in each third step and have dropout."""
    model = builders.llama(tmp_path / "model", smollm2, attention_dropout=0.2)
    records = builders.write_records(tmp_path / "records.jsonl")
    others = builders.write_records(tmp_path / "others.jsonl", 23)
    variants = {name: words.format(records=others) for name, words in VARIANTS.items()}
    file = write_config(tmp_path, model, records, train=dict(variants=variants, turn=2), checkpoint=dict(interval=3))
    file.write_text(file.read_text().replace("dtype: float32", f"dtype: {dtype}"))
    return file


def run_sweep(mesh, file, stop_after=None, overrides=()):
    """Until its end, or until all variants together have run so many steps."""
    stop, steps = StopRequests(), []

    def count(figures, _):
        steps.append(1)
        if len(steps) == stop_after:
            stop.reason = "enough"
        return figures

    base, _ = configs.load(file, overrides, several=True)
    with hooks.around(trainer.Trainer, "run_step", after=count):
        try:
            train_all(configs.load_runs(file, overrides), mesh, set(), stop, base.train.turn)
        except Stopped:
            return "stopped"
        except UserError as error:
            return str(error)
    return "finished"


def apart_and_together(mesh, file, folder):
    """Each variant by itself; then all, with two stops, and one of them by itself in between."""
    for name, words in configs.load(file, several=True)[0].train.variants.items():
        apart = [*words.split(), f"run_dir={folder}/apart/{name}", "train.variants={}", "train.turn=10"]
        train(*reordered(configs.load(file, apart), mesh), set(), StopRequests())
    ends = [run_sweep(mesh, file, 7), run_sweep(mesh, file, 3)]
    alone = folder / "run" / "low" / "config.yaml"
    train(*reordered(configs.load(alone, ()), mesh), set(), StopRequests())
    return [*ends, run_sweep(mesh, file)]


def reordered(loaded, mesh):
    config, text = loaded
    return config, mesh, text


def figures(run_dir):
    """All that a run has measured but times and memory, by step."""
    kept = ("train/", "eval/", "selection/")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        found.setdefault(line["step"], {}).update({key: line[key] for key in line if key.startswith(kept)})
    return {step: held for step, held in found.items() if held}


@pytest.mark.parametrize(("world_size", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_each_learns_what_it_learns_by_itself(world_size, dtype, smollm2, tmp_path):
    file = written(tmp_path, smollm2, dtype)
    for ends in ranks.run(world_size, apart_and_together, file, tmp_path):
        assert ends == ["stopped", "stopped", "finished"]
    outcomes = set()
    for name in VARIANTS:
        apart, together = tmp_path / "apart" / name, tmp_path / "run" / name
        assert len(claims.attempts(together)) == 3 + (name == "low")
        assert builders.last_end(together)["outcome"] == "finished"
        assert figures(together) == figures(apart)
        assert builders.files_of(together) == builders.files_of(apart)
        assert builders.contents(together / "export") == builders.contents(apart / "export")
        outcomes.add(json.dumps(builders.files_of(together)))
        assert "selection/survived" in figures(together)[3]
        assert "eval/loss" in figures(together)[0]
    assert len(outcomes) == len(VARIANTS)
