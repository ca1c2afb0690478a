"""Runs that share a model: each learns, to the bit, what it learns by itself, however they are stopped and continued."""

import json

import builders
import hooks
import pytest
import ranks
from commands import call, run_command, user_error, write_config

from liftdist import config as configs
from liftdist.errors import Stopped, UserError
from liftdist.runs import claims
from liftdist.runs.stop import StopRequests
from liftdist.training import trainer
from liftdist.training.run import train, train_all

VARIANTS = {
    "low": "optimizer.lr=1e-3 train.eval_kl=true checkpoint.interval=2",
    "other_data": "data.path={records} train.seed=4 train.steps=6 train.loss=asft train.kl_weight=0.3",
    "sgd": "optimizer.name=sgd optimizer.lr=0.05 selection.criterion=magnitude selection.density=0.08 train.batch_size=4",
}


RULES = {  # of selections that take more than the weights: gradients, base values, what was learned, other matrices each time
    "low": "selection.criterion=spiel selection.final_refresh=4",
    "layers": "selection.budget=layers selection.layers=1 selection.density= train.seed=4",
    "ist": "selection.budget=ist selection.layers=1 selection.criterion=magnitude",
    "gradient": "selection.criterion=gradient optimizer.dtype=bfloat16",
    "decay": "optimizer.decay_towards=base optimizer.weight_decay=0.1 optimizer.bias_correction=entry",
}
EXPERTS = dict(model_type="qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48)


def written(tmp_path, smollm2, dtype="float32", given=VARIANTS, **sizes):
    """A config of variants, which refresh in each third step and have dropout."""
    model = builders.llama(tmp_path / "model", smollm2, attention_dropout=0.2, **sizes)
    records = builders.write_records(tmp_path / "records.jsonl")
    others = builders.write_records(tmp_path / "others.jsonl", 23)
    variants = {name: words.format(records=others) for name, words in given.items()}
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
    """Each variant by itself; then all, until they are stopped; one of them by itself; all to their ends."""
    for name, words in configs.load(file, several=True)[0].train.variants.items():
        apart = [*words.split(), f"run_dir={folder}/apart/{name}", "train.variants={}", "train.turn=10"]
        train(*reordered(configs.load(file, apart), mesh), set(), StopRequests())
    ends = [run_sweep(mesh, file, 7)]
    alone = folder / "run" / "low" / "config.yaml"
    train(*reordered(configs.load(alone, ()), mesh), set(), StopRequests())
    return [*ends, run_sweep(mesh, file)]


def reordered(loaded, mesh):
    config, text = loaded
    return config, mesh, text


def figures(run_dir):
    """All that a run has measured but times and memory, by step."""
    kept = ("train/", "eval/", "selection/", "experts/")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        found.setdefault(line["step"], {}).update({key: line[key] for key in line if key.startswith(kept)})
    return {step: held for step, held in found.items() if held}


@pytest.mark.parametrize(
    ("world_size", "dtype", "given", "sizes"),
    [
        (2, "bfloat16", VARIANTS, EXPERTS),
        pytest.param(1, "float32", VARIANTS, {}, marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", RULES, {}, marks=pytest.mark.slow),
    ],
    ids=["experts", "one_rank", "rules"],
)
def test_each_learns_what_it_learns_by_itself(world_size, dtype, given, sizes, smollm2, tmp_path):
    file = written(tmp_path, smollm2, dtype, given, **sizes)
    for ends in ranks.run(world_size, apart_and_together, file, tmp_path):
        assert ends == ["stopped", "finished"]
    outcomes = set()
    for name in given:
        apart, together = tmp_path / "apart" / name, tmp_path / "run" / name
        assert len(claims.attempts(together)) == 2 + (name == "low")
        assert builders.last_end(together)["outcome"] == "finished"
        assert figures(together) == figures(apart)
        assert builders.files_of(together) == builders.files_of(apart)
        assert builders.contents(together / "export") == builders.contents(apart / "export")
        outcomes.add(json.dumps(builders.files_of(together)))
        assert "selection/survived" in figures(together)[3]
        assert "eval/loss" in figures(together)[0]
        assert ("experts/busiest" in figures(together)[1]) == bool(sizes)
    assert len(outcomes) == len(given)


def test_one_that_fails_leaves_the_others_alone(smollm2, tmp_path):
    """By the command: one of two learns until its loss is not finite."""
    file = written(tmp_path, smollm2)
    shared = ["train.steps=3", "train.export=false"]
    variants = "{high: optimizer.lr=1e38 train.max_skipped_steps=0, low: optimizer.lr=1e-3}"
    run = run_command("train", file, "--nproc", 1, *shared, f"train.variants={variants}", "train.turn=1")
    said = user_error(run)
    assert "1 of 2 runs failed: high: step " in said
    assert "were skipped (train.max_skipped_steps)" in said
    assert "high: FAILED, the others go on: step " in run.stdout
    ends = [builders.last_end(tmp_path / "run" / name) for name in ("high", "low")]
    assert [end["outcome"] for end in ends] == ["failed", "finished"]
    assert "were skipped" in ends[0]["reason"]
    apart = [*shared, "optimizer.lr=1e-3", f"run_dir={tmp_path}/apart", "train.variants={}", "train.turn=10"]
    ranks.run(1, by_itself, file, apart)
    assert figures(tmp_path / "run" / "low") == figures(tmp_path / "apart")
    assert builders.files_of(tmp_path / "run" / "low") == builders.files_of(tmp_path / "apart")


def by_itself(mesh, file, overrides):
    train(*reordered(configs.load(file, overrides), mesh), set(), StopRequests())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("a=model.dtype=bfloat16", "train.variants.a: model.dtype: is the same in all variants, which share a model"),
        ("a=train.micro_batch_size=1", "train.variants.a: train.micro_batch_size: is the same in all variants"),
        ("a=run_dir=elsewhere", "train.variants.a: run_dir: is the same in all variants"),
        ("a=optimizer.lr=fast", "train.variants.a: override 'optimizer.lr=fast': optimizer.lr: "),
        ("a=optimizer.lr='1", "train.variants.a: no closing quotation: optimizer.lr='1"),
        ("a-b=optimizer.lr=1", "the name after train.variants must consist of letters, digits and underscores"),
        ("a=train.steps=2 method=full", "train.variants.a: method: is the same in all variants"),
    ],
)
def test_what_variants_have_in_common_cannot_be_set_by_one(words, problem, tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    code, said = call("train", file, f"train.variants.{words}")
    assert (code, len(said.splitlines())) == (2, 1)
    assert problem in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("method=full", "method: must be lift with train.variants"),
        ("model.base_dtype=int8", "model.base_dtype: must be unset with train.variants"),
        ("model.compile=true", "model.compile: must be false with train.variants"),
        ("train.fit_memory=true", "train.fit_memory: must be false with train.variants"),
        ("sync.to=versions", "train.variants: several publish in one folder; give each a sync.to of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused(override, problem, tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    code, said = call("train", file, "train.variants.a=optimizer.lr=1", "train.variants.b=optimizer.lr=2", override)
    assert (code, len(said.splitlines())) == (2, 1)
    assert problem in said


@pytest.mark.parametrize("command", ["eval", "select", "data", "submit"])
def test_commands_on_one_run_refuse_several(command, tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    code, said = call(command, file, "train.variants.a=optimizer.lr=1")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "train.variants: makes several runs, which `liftdist train` and `liftdist plan` take" in said
    code, said = call("train", file, "train.turn=3")
    assert code == 2
    assert "train.turn: is used with train.variants alone" in said


def test_a_plan_counts_what_each_of_them_holds(tiny_model, tmp_path):
    """The one whose turn takes most is planned, whichever it is."""
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))

    def memory(*overrides):
        code, said = call("plan", file, "--gpus-per-node=2", "--json", *overrides)
        assert code == 0, said
        return json.loads(said)["memory"]

    own = "principal", "base values", "previously selected"
    wide, narrow = ("optimizer.name=sgd selection.density=0.2 train.batch_size=4", "optimizer.lr=1")
    alone = [memory(*words.split(), "train.eval_kl=true") for words in (wide, narrow)]  # keeps base values
    together = memory(f"train.variants.a={narrow}", f"train.variants.b={wide}", f"train.variants.c={narrow}")
    held = [sum(found[name] for name in own) for found in alone]
    assert together["other variants"] + sum(together[name] for name in own) == held[0] + 2 * held[1]
    assert "other variants" not in alone[0]
