"""When AdaLoRA drops ranks: not before there are steps for it, and once for all where the step of the last choice was skipped."""

import pytest
import torch
from torch import nn

from liftdist.engine.dense import DenseWeights
from liftdist.errors import UserError
from liftdist.method_settings import AdaLoraConfig, LoraConfig
from liftdist.methods import lora
from liftdist.models import adapters
from liftdist.schema import Config


def method_of(**schedule):
    config = Config(method="lora", lora=LoraConfig(variant="adalora", rank=4, adalora=AdaLoraConfig(2, **schedule)))
    model = nn.ModuleDict({"q": nn.Linear(7, 9, bias=False), "v": nn.Linear(7, 5, bias=False)}).to("meta")
    adapters.inject(model, config.lora, ["*"])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    made = lora.Lora(config, DenseWeights(model), [], adapters.layers(model), print)
    for value in made.dense.values:
        nn.init.normal_(value)
    return made


def ranks_after(made, step, steps, is_skipped=False):
    """How many ranks are left after a step with a random gradient."""
    made.before_step(step, steps)
    for param in made.dense.params.values():
        param.grad = torch.randn_like(param)
    made.reduce(torch.ones(()))
    if is_skipped:
        made.skip()
    else:
        made.step()
    return sum(
        int((value != 0).sum())
        for name, value in zip(made.dense.params, made.dense.values, strict=True)
        if "lora_E" in name
    )


@pytest.mark.parametrize("schedule", [dict(tinit=5), dict(tfinal=5), dict(tinit=2, tfinal=3)])
def test_a_schedule_that_is_longer_than_the_run_is_refused(schedule):
    made = method_of(**schedule)
    made.before_step(1, 6)
    with pytest.raises(
        UserError, match=r"must be less than the run's 5 steps less tfinal=.; lower them, or raise train.steps"
    ):
        made.before_step(1, 5)


def test_ranks_are_dropped_to_the_target_and_stay_dropped():
    made = method_of(tinit=1, tfinal=2)
    counts = [ranks_after(made, step, 8) for step in range(1, 9)]
    budgets = [8, *(int((8 - 4) * (1 - (step - 1) / 5) ** 3 + 4) for step in range(2, 7)), 4, 4]
    assert counts == budgets
    assert made.scalars()["ranks_final"]


def test_a_last_choice_whose_step_was_skipped_is_made_after_the_next():
    made = method_of(tfinal=2)
    assert [ranks_after(made, step, 6, is_skipped=step > 1) for step in range(1, 5)] == [5, 5, 5, 5]
    assert "ranks_final" not in made.scalars()
    assert [ranks_after(made, step, 6) for step in (5, 6)] == [4, 4]


def test_the_regularisation_is_that_of_the_factors():
    """Against the formula, on factors that are nearly orthogonal and far from it."""
    made = method_of(orth_reg_weight=0.3)
    made.before_step(1, 9)
    factors = {name: param for name, param in made.dense.params.items() if "lora_E" not in name}
    for param in made.dense.params.values():
        param.grad = torch.zeros_like(param)
    made.reduce(torch.ones(()))
    copies = {name: param.detach().double().requires_grad_() for name, param in factors.items()}
    squares = {name: w @ w.T if "lora_A" in name else w.T @ w for name, w in copies.items()}
    (0.3 * sum((square - torch.eye(4)).norm() for square in squares.values()) / len(copies)).backward()
    for name, value in zip(made.dense.params, made.dense.values, strict=True):
        if name in copies:
            torch.testing.assert_close(value.grad, copies[name].grad.float())
        else:
            assert not value.grad.any()
