"""IST: what trials with scaled-down layers teach, against plain forwards on one process, on any ranks; continued to the bit."""

import copy
import math
from collections import Counter
from pathlib import Path

import builders
import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from liftdist import PrincipalWeights
from liftdist.console import Console
from liftdist.data.order import BatchOrder
from liftdist.distributed.collectives import gather
from liftdist.distributed.sharding import whole_tensor
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.budgets.ist import Ist
from liftdist.engine.criteria.magnitude import Magnitude
from liftdist.engine.principal import TRIAL_BATCHES
from liftdist.errors import Stopped
from liftdist.training.inputs import prepare_inputs

WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "2x2": (4, 2)}
ROWS, LAYERS = 4, 4


def settings_of(folder):
    return builders.config(
        Path(folder) / "dense",
        Path(folder) / "records.jsonl",
        Path(folder) / "run",
        selection=dict(budget="ist", layers=2, seed=5, refresh_interval=3, criterion="magnitude", density=0.3),
        train=dict(steps=8, batch_size=6, micro_batch_size=ROWS, seed=3),
        optimizer=dict(lr=0.2),
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("ist")
    builders.write_records(made / "records.jsonl")
    builders.llama(made / "dense", tiny_model, num_hidden_layers=LAYERS)
    return made


def layers_of(principal):
    return sorted({m.name.split(".")[2] for m, n in zip(principal.matrices, principal.counts, strict=True) if n})


def learned(mesh, folder):
    made = builders.trainer(mesh, settings_of(folder))
    principal = made.method.principal
    made.run_step()
    made.run_step()
    first = layers_of(principal)
    weights = {name: whole_tensor(param).clone() for name, param in made.model.named_parameters()}
    with principal.selector.advanced(1, principal._loss_of):
        importance = principal.selector.importance
    assert all(torch.equal(whole_tensor(param), weights[name]) for name, param in made.model.named_parameters())
    return first, weights, importance, gather(importance)


def plain_importance(settings, weights):
    """As the papers have it, by plain forwards."""
    samples = prepare_inputs(settings, Console(False)).samples
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    sequences = BatchOrder(samples.lengths, 3, False, 64, TRIAL_BATCHES * ROWS).batch(0)
    random = np.random.default_rng([5, 1, 1])
    names = [f"model.layers.{number}" for number in range(LAYERS)]
    halves = [set(random.choice(names, LAYERS // 2, replace=False)) for _ in range(3)]
    rewards = []
    for half in halves:
        model = copy.deepcopy(base)
        for name, param in model.named_parameters():
            factor = 0.25 if any(name.startswith(f"{layer}.") for layer in half) else 1
            param.data += factor * (weights.get(name, param.data) - param.data)
        losses = []
        for begin in range(0, len(sequences), ROWS):
            rows = [samples.table[sample] for sequence in sequences[begin : begin + ROWS] for sample in sequence]
            total, labels = 0.0, 0
            for row in rows:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
                targets = torch.tensor(row["labels"][1:])
                total += F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).item()
                labels += int((targets != -100).sum())
            losses.append(total / labels)
        rewards.append(math.exp(-sum(losses) / len(losses)))
    importance = dict.fromkeys(names, 0.0)
    for half, reward in zip(halves, rewards, strict=True):
        for layer in half:
            s = 1 / (1 + math.exp(-importance[layer]))
            importance[layer] += 10 * (reward - sum(rewards) / 3) * s * (1 - s)
    return importance


@pytest.mark.parametrize("world", ["2", *(pytest.param(world, marks=pytest.mark.slow) for world in ("1", "3", "2x2"))])
def test_importance_is_that_of_plain_forwards(world, folder):
    size, replicas = WORLDS[world]
    (first, weights, importance, everywhere), *_ = ranks.run(size, learned, folder, dp_replicate=replicas)
    assert len(first) == 2
    assert all(other == importance for other in everywhere)
    wanted = plain_importance(settings_of(folder), weights)
    assert max(map(abs, wanted.values())) > 1e-5  # a loss of 5.5: exp(-loss) is small
    assert importance == pytest.approx(wanted, rel=1e-2, abs=1e-9)


def four_more(made):
    principal = made.method.principal
    before = layers_of(principal), dict(principal.selector.importance)
    losses = [made.run_step()["train/loss"] for _ in range(4)]
    return losses, before, layers_of(principal), dict(principal.selector.importance), builders.global_digest(made)


def test_it_continues_over_a_refresh(folder):
    settings = settings_of(folder)
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 4, four_more)
    assert len(expected[2]) == 2
    assert expected[1][1] != expected[3]
    assert found == expected
    (on_one,) = ranks.run(1, builders.continued, settings, four_more)
    assert on_one[1:3] == expected[1:3]
    assert on_one[3] == pytest.approx(expected[3], rel=1e-2)


def test_a_refresh_that_is_stopped_has_taught_nothing():
    """So the checkpoint of the stop is that of the step before, and what continues refreshes as if there had been no stop."""
    stops: set[int] = set()  # numbers of matrices selected

    def progress(done, _):
        if done in stops:
            raise Stopped("SIGTERM")

    def begin():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(LAYERS)))

        def batches(number):
            for seed in range(number):
                yield model(torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))).square().mean()

        budget = Ist(density=0.3, layers=2, seed=5)
        principal = PrincipalWeights(
            model, criterion=Magnitude(), budget=budget, keep_base=True, backwards=batches, progress=progress
        )
        optimizer = PrincipalAdamW(principal, lr=0.2)
        for loss in batches(2):
            loss.backward()
            optimizer.step()
        return principal, optimizer

    principal, optimizer = begin()
    before = principal.scalar_states(optimizer)
    for done in range(1, LAYERS + 1):
        stops.add(done)
        with pytest.raises(Stopped):
            principal.refresh(optimizer)
        assert principal.scalar_states(optimizer) == before
        stops.clear()
    plain, its_optimizer = begin()
    for _ in range(3):
        assert principal.refresh(optimizer) == plain.refresh(its_optimizer)
        assert principal.selector.importance == plain.selector.importance
        assert principal.counts == plain.counts
    assert any(principal.selector.importance.values())


def test_layers_that_matter_less_when_scaled_are_drawn_less():
    shapes = {f"model.layers.{layer}.up.weight": (10, 10) for layer in range(4)}
    budget = Ist(density=0.1, layers=1, seed=1)
    known = {"model.layers.0": 3.0, "model.layers.3": -3.0}
    drawn = Counter()
    for refresh in range(2000):
        counts = budget.allot(shapes, refresh, known)
        assert sorted(counts.values()) == [0, 0, 0, 10]
        drawn[max(counts, key=counts.get).split(".")[2]] += 1
    odds = torch.tensor([-3.0, 0.0, 0.0, 3.0]).sigmoid()
    for layer, share in enumerate((odds / odds.sum()).tolist()):
        assert drawn[str(layer)] / 2000 == pytest.approx(share, abs=0.03)
