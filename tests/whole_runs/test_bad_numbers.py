"""Losses and gradients that are not finite, on one rank of two."""

import json

import builders
import hooks
import pytest
import ranks
import torch

from liftdist.training import objective


def with_bad_numbers(mesh, config, kind, steps):
    """One attempt in which rank 1 computes a loss, or a gradient, that is no number in some steps."""
    calls = 0

    def spoil(loss, *_):
        nonlocal calls
        calls += 1
        if mesh.rank == 1 and (calls + 1) // 2 in steps:
            if kind == "loss":
                loss = loss * torch.nan
            else:
                loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    with hooks.around(objective, "token_losses", after=spoil):
        return builders.run_once(mesh, config)


def numbers_gone_wrong(mesh, config, folder):
    outcomes = {}
    for kind, steps in (("loss", (3,)), ("gradient", (3,)), ("every", tuple(range(3, 9)))):
        config.run_dir = str(folder / kind)
        end = with_bad_numbers(mesh, config, "loss" if kind == "every" else kind, steps)
        outcomes[kind] = (end, *builders.files_of(folder / kind))
    return outcomes


@pytest.fixture
def diverging(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    return builders.config(
        tiny_model, records, tmp_path,
        train=dict(steps=8, batch_size=6, export=False, max_skipped_steps=3),
        optimizer=dict(max_grad_norm=1.0),
        checkpoint=dict(interval=2, keep=9),
    )  # fmt: skip


def test_a_step_that_goes_wrong_on_one_rank_changes_nothing_on_any(diverging, tmp_path):
    (outcomes, other) = ranks.run(2, numbers_gone_wrong, diverging, tmp_path)
    assert outcomes == other
    (end, step, files), (gradient_end, _, gradient_files), (stopped, stopped_at, _) = outcomes.values()
    assert end == gradient_end == "finished"
    assert step == 8
    assert files == gradient_files  # both have left out step 3 and nothing else
    lines = [json.loads(line) for line in (tmp_path / "loss" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    assert [steps[step]["train/skipped_steps"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert steps[3]["train/loss"] is None
    assert steps[8]["train/sequences"] == 48  # the samples of the skipped step are behind us
    assert stopped_at == 2  # the last before it went wrong
    assert "step 6: loss nan" in stopped
    assert "4 steps in a row were skipped (train.max_skipped_steps)" in stopped
    assert "gradient not finite in model.layers.0." in stopped
    assert f"samples {tmp_path}/records.jsonl:" in stopped


def with_large_gradients(mesh, config):
    """Gradients whose squares are beyond float32, in step 2: finite, and yet poison for Adam's second moment."""
    calls = 0

    def spoil(loss, *_):
        nonlocal calls
        calls += 1
        if (calls + 1) // 2 == 2:
            loss.register_hook(lambda gradient: gradient * 1e25)
        return loss

    config.optimizer.max_grad_norm = None
    with hooks.around(objective, "token_losses", after=spoil):
        return builders.run_once(mesh, config)


def test_a_gradient_whose_square_overflows_is_no_step(diverging, tmp_path):
    assert ranks.run(2, with_large_gradients, diverging) == ["finished"] * 2
    assert builders.files_of(tmp_path / "run")[0] == 8
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines if "train/loss" in line] == [0] + [1] * 7


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_gradient_that_is_not_finite_names_its_samples(reduction, diverging, tmp_path):
    diverging.train.max_skipped_steps = 0
    diverging.train.loss_reduction = reduction
    end, _ = ranks.run(2, with_bad_numbers, diverging, "gradient", (1,))
    assert end.startswith("UserError: step 1: loss ")
    assert "gradient norm nan" in end or "gradient norm inf" in end
    assert "and 2 more" in end  # all six samples of the batch: a finite loss does not tell which
