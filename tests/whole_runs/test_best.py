"""The best step is kept and exported beside the last, training ends where nothing gets better, both over a stop."""

import json
import shutil

import commands
import pytest
import torch
from safetensors.torch import load_file

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.runs import claims
from liftdist.schema import Config
from liftdist.training.best import Best


def best_of(tag, of="auto", patience=None):
    config = Config()
    config.checkpoint.best, config.checkpoint.best_of, config.train.patience = tag, of, patience
    return Best(config)


def test_what_is_better():
    best = best_of("eval/loss", patience=2)
    assert not best.compare(0, {"eval/loss": 0.1})  # the base model
    assert [best.compare(step, {"eval/loss": value}) for step, value in ((2, 3.0), (4, 2.0), (6, 2.0))] == [
        True,
        True,
        False,
    ]
    assert not best.compare(7, {"eval/other": 0.0})  # another evaluation
    assert best.reason_to_stop() is None
    assert not best.compare(8, {"eval/loss": float("nan")})
    assert "eval/loss has not been better than 2.0000 after step 4 in 2 evaluations" in best.reason_to_stop()
    again = best_of("eval/loss", patience=2)
    again.restore(json.loads(json.dumps(best.state())))
    assert (again.step, again.value, again.worse) == (4, 2.0, 2)
    other = best_of("eval/said/accuracy")
    other.restore(best.state())
    assert other.step is None
    values = [(2, 0.5), (4, 0.4), (6, 0.6)]
    assert [other.compare(step, {"eval/said/accuracy": value}) for step, value in values] == [True, False, True]
    change = best_of("eval/said/accuracy_change")
    assert not change.compare(0, {"eval/said/accuracy": 0.5})  # since then
    assert change.compare(2, {"eval/said/accuracy": 0.4, "eval/said/accuracy_change": -0.1})
    turned = best_of("eval/loss", "max")
    turned.restore(best.state())
    assert turned.step is None
    bound = best_of("eval/said/perplexity/high")
    values = [(2, 9.0), (4, 7.0), (6, 8.0)]
    assert [bound.compare(step, {"eval/said/perplexity/high": value}) for step, value in values] == [True, True, False]
    with pytest.raises(UserError, match="checkpoint.best=eval/los: no evaluation has this figure; there are eval/loss"):
        best_of("eval/los").compare(0, {"eval/loss": 1.0})


def test_the_best_step_is_kept_and_exported(tiny_model, records, tmp_path):
    """The greatest loss is the best here: it falls, so that the first evaluation has it."""
    config = commands.write_config(
        tmp_path,
        tiny_model,
        records,
        checkpoint=dict(interval=1, keep=1, best="eval/loss", best_of="max"),
        train=dict(steps=30, patience=2, eval_interval=2),
        eval=dict(
            tasks=[dict(name="said", kind="perplexity", path=str(records), limit=2)]
        ),  # before and after training
        optimizer=dict(schedule="constant"),
    )
    run = commands.run_command("train", config)
    assert run.returncode == 0, run.stdout
    run_dir = tmp_path / "run"
    assert "training ends after step 6 of 30: eval/loss has not been better than" in run.stdout
    assert "step 6: evaluation said/perplexity" in run.stdout
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000006"]
    best, last = (load_file(run_dir / folder / "model.safetensors") for folder in ("export-best", "export"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    again = commands.run_command("train", config)
    assert again.returncode == 0, again.stdout
    assert "training ends after step 6 of 30" in again.stdout
    more = commands.run_command("train", config, "train.patience=3")
    assert more.returncode == 0, more.stdout
    assert "training ends after step 8 of 30" in more.stdout
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000008"]
    exports = [e for events in claims.attempts(run_dir).values() for e in events if e["event"] == "export"]
    assert [(event["step"], event["folder"]) for event in exports] == [(6, "export"), (2, "export-best"), (8, "export")]
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")
    lost = commands.run_command("train", config, "train.patience=3")  # has nothing left to do
    assert lost.returncode == 0, lost.stdout
    assert "step 2, the best, is not exported: " in lost.stdout
    assert all(
        torch.equal(best[name], t) for name, t in load_file(run_dir / "export-best" / "model.safetensors").items()
    )
    turned = commands.run_command("train", config, "checkpoint.best_of=min", "train.steps=10", "--allow-changes")
    assert turned.returncode == 0, turned.stdout
    assert "step 10, the last, is the best" in turned.stdout
    assert f"{run_dir / 'export-best'}, which is not of step 10, is {run_dir / 'export-best-2'} now" in turned.stdout
    assert sorted(path.name for path in run_dir.glob("export-best*")) == ["export-best-2"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["train.patience=2"], "train.patience: needs checkpoint.best"),
        (["checkpoint.best_of=min"], "checkpoint.best_of: is used with checkpoint.best alone"),
        (["checkpoint.best=loss"], "checkpoint.best"),
        (
            ["checkpoint.best=eval/loss"],
            "checkpoint.best: needs train.eval_interval, the steps between two looks at eval/loss",
        ),
        (
            ["checkpoint.best=eval/gsm8k/accuracy", "eval.tasks=[gsm8k]", "train.eval_interval=5"],
            "checkpoint.best: needs eval.interval, the steps between two looks at eval/gsm8k/accuracy",
        ),
        (
            ["checkpoint.best=eval/gsm8k", "eval.tasks=[gsm8k]", "eval.interval=5"],
            "checkpoint.best: must be a figure of the task: eval/gsm8k/accuracy or eval/gsm8k/accuracy_change, got eval/gsm8k",
        ),
        (
            ["checkpoint.best=eval/own_text/kl_to_base_change", "eval.tasks=[own_text]", "eval.interval=5"],
            "must be a figure of the task: eval/own_text/kl_to_base, got eval/own_text/kl_to_base_change",
        ),
    ],
)
def test_settings(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)
