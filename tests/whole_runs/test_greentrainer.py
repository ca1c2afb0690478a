"""GreenTrainer: the best set of matrices by brute force and by dense gradients, on any ranks; what backward saves by it."""

import itertools
from pathlib import Path

import builders
import pytest
import ranks
import torch
from test_by_gradients import BATCHES, ROWS, WORLDS, batches_of_gradients
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.engine.budgets.greentrainer import STEPS, knapsack
from liftdist.errors import UserError
from liftdist.training.inputs import prepare_inputs

SHARE = 0.4


def cost_of(chosen, costs):
    first = chosen.index(True)
    return sum(cost for cost, taken in zip(costs, chosen, strict=True) if taken) + sum(costs[first + 1 :])


def test_knapsack_is_the_best_of_all_sets():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        number = int(torch.randint(1, 9, (1,), generator=generator))
        costs = torch.randint(1, 50, (number,), generator=generator).tolist()
        importance = torch.rand(number, generator=generator).tolist()
        share = float(torch.rand(1, generator=generator)) * 0.9 + 0.1
        everything = cost_of([True] * number, costs)
        chosen = knapsack(importance, costs, share)
        value = sum(one for one, taken in zip(importance, chosen, strict=True) if taken)
        assert not any(chosen) or cost_of(chosen, costs) <= share * everything + 1e-6
        tight = share * everything - (number + 1) * everything / STEPS  # what rounding up may lose
        sets = [s for s in itertools.product([False, True], repeat=number) if any(s) and cost_of(s, costs) <= tight]
        best = max((sum(one for one, taken in zip(importance, s, strict=True) if taken) for s in sets), default=0)
        assert value >= best - 1e-12
    assert knapsack([1.0, 2.0, 3.0], [5, 7, 9], 1.0) == [True] * 3


def settings_of(folder):
    return builders.config(
        Path(folder) / "dense",
        Path(folder) / "records.jsonl",
        Path(folder) / "run",
        selection=dict(
            criterion="gradient",
            budget="greentrainer",
            density=None,
            backward_flops=SHARE,
            gradient_batches=BATCHES,
            refresh_interval=2,
        ),
        train=dict(steps=5, batch_size=6, micro_batch_size=ROWS, seed=3),
        optimizer=dict(lr=5e-3),
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("green")
    builders.write_records(made / "records.jsonl")
    builders.llama(made / "dense", tiny_model, num_hidden_layers=3, tie_word_embeddings=False)
    return made


def selected(mesh, folder):
    made = builders.trainer(mesh, settings_of(folder))
    principal = made.method.principal
    found = {matrix.name: count for matrix, count in zip(principal.matrices, principal.counts, strict=True)}
    ids = torch.arange(24).view(1, 24)
    with FlopCounterMode(display=False) as forward:
        loss = made.model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return found, forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("world", ["2", *(pytest.param(world, marks=pytest.mark.slow) for world in ("1", "3", "2x2"))])
def test_matrices_are_those_of_the_dense_gradients(world, folder):
    size, replicas = WORLDS[world]
    (counts, forward, backward), *others = ranks.run(size, selected, folder, dp_replicate=replicas)
    assert all(other[0] == counts for other in others)
    settings = settings_of(folder)
    samples = prepare_inputs(settings, Console(False)).samples
    model = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    importance = dict.fromkeys(counts, 0.0)
    for gradients in batches_of_gradients(samples, model):
        for name, gradient in gradients.items():
            importance[name] += gradient.double().square().sum().item()
    costs = [model.get_parameter(name).numel() for name in counts]
    chosen = knapsack([importance[name] for name in counts], costs, SHARE)
    assert 1 < sum(chosen) < len(chosen)
    assert counts == {name: cost if taken else 0 for name, cost, taken in zip(counts, costs, chosen, strict=True)}
    # of 24 tokens: products with weights, besides those of the head, and attention, which backward has, too
    head = 2 * 24 * model.lm_head.weight.numel()
    attention = forward - head - 2 * 24 * sum(costs)
    assert backward - head <= 2 * 24 * SHARE * cost_of([True] * len(costs), costs) + 3 * attention


def three_more(made):
    return [made.run_step()["train/loss"] for _ in range(3)], made.method.principal.counts, builders.global_digest(made)


def test_it_continues_over_a_refresh(folder):
    settings = settings_of(folder)
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 1, three_more)
    assert found == expected
    ((losses, counts, _),) = ranks.run(1, builders.continued, settings, three_more)
    assert losses == pytest.approx(expected[0], rel=1e-2)
    assert counts == expected[1]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["budget=greentrainer"], "selection.criterion: must be gradient with selection.budget=greentrainer"),
        (["budget=greentrainer", "criterion=gradient"], "selection.backward_flops: must be given"),
        (["density=0.1", "backward_flops=0.5"], "selection.backward_flops: must be given with selection.budget=greentrainer"),
        (["budget=greentrainer", "criterion=gradient", "backward_flops=0.5", "density=0.1"], "selection.density: is not used"),
    ],
)  # fmt: skip
def test_settings(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", [f"selection.{override}" for override in overrides])
    assert problem in str(caught.value)
