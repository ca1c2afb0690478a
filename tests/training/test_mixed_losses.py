"""Losses of several sources, and of several held-out sets: on any ranks and packing those of plain transformers."""

import json
import math

import builders
import pytest
import ranks
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from liftdist.console import Console
from liftdist.data.tokenised import IGNORED
from liftdist.data_settings import EvalSourceConfig, SourceConfig
from liftdist.evaluation import held_out_loss
from liftdist.models import head
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.losses.cross_entropy import per_token

WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "replicas": (2, 2)}
BATCH, STEPS = 7, 3
WAYS = [
    (packing, reduction, size)
    for packing in (False, True)
    for reduction, size in (("token", 3), ("sequence", 1), ("sequence", 4))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Replies of 2 to 52 tokens, short ones and single ones; and two held-out files."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {
        "long": [{"prompt": f"{i} times", "completion": f" {i}" * (1 + i * i % 17)} for i in range(20)],
        "short": [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(9)],
        "rare": [{"text": f"rare {i}"} for i in range(3)],
        "held": [{"text": f"held {i} " * (1 + i % 5)} for i in range(7)],
        "other": [{"prompt": f"other {i}", "completion": f" {i}" * i} for i in range(1, 4)],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(model, folder, packing=False):
    weights = {"long": 2.0, "short": 3.0, "rare": 0.3}
    return builders.config(
        model,
        folder,
        folder,
        data=dict(
            path=None,
            packing=packing,
            sources=[SourceConfig(path=f"{folder}/{name}.jsonl", weight=weight) for name, weight in weights.items()],
            eval_sources=[EvalSourceConfig(path=f"{folder}/{name}.jsonl") for name in ("held", "other", "short")],
        ),
        optimizer=dict(lr=1e-30),  # no weight changes
        train=dict(batch_size=BATCH, steps=STEPS),
    )


def losses(mesh, model, folder):
    """For each way to compute them, the figures of each step and its samples; and those of the evaluation. Collective."""
    found, evaluations = {}, []
    for packing in (False, True):
        config = settings(model, folder, packing)
        trainer = builders.trainer(mesh, config)
        for way in (way for way in WAYS if way[0] == packing):
            _, config.train.loss_reduction, config.train.micro_batch_size = way
            trainer.step = trainer.consumed = 0
            found[way] = []
            for _ in range(STEPS):
                batch = [sample for sequence in trainer.order.batch(trainer.consumed) for sample in sequence]
                figures = trainer.run_step()
                found[way].append((batch, {tag: value for tag, value in figures.items() if tag.endswith("loss")}))
        evaluations.append(
            held_out_loss.run(
                RunContext(config, mesh, Console(False)), trainer.inputs, trainer.model, trainer.method, step=0
            )
        )
    return found, evaluations


@pytest.fixture(scope="module")
def reference(tiny_model, folder):
    """The mean loss of lists of rows, and its parts, by transformers, one row at a time."""
    from liftdist.training.inputs import prepare_inputs

    inputs = prepare_inputs(settings(tiny_model, folder), Console(False))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    known = {}

    @torch.no_grad()
    def loss(row):
        key = tuple(row["input_ids"]), tuple(row["labels"])
        if key not in known:
            given = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            known[key] = model(**given).loss.item(), sum(label != IGNORED for label in row["labels"][1:])
        return known[key]

    def mean(rows, reduction):
        found = [loss(row) for row in rows]
        if reduction == "sequence":
            return sum(value for value, _ in found) / len(found)
        return sum(value * count for value, count in found) / sum(count for _, count in found)

    return inputs, mean


@pytest.mark.parametrize("world", WORLDS)
def test_losses_are_those_of_one_sample_at_a_time(world, tiny_model, folder, reference):
    size, replicas = WORLDS[world]
    inputs, mean = reference
    bounds = {"long": (0, 20), "short": (20, 29), "rare": (29, 32)}
    evaluated = {
        f"eval/{name}/loss": mean([samples.table[i] for i in range(len(samples))], "token")
        for name, samples in inputs.held_out.items()
    }
    everything = [samples.table[i] for samples in inputs.held_out.values() for i in range(len(samples))]
    evaluated["eval/loss"] = mean(everything, "token")
    assert len({round(value, 3) for value in evaluated.values()}) == 4
    for found, evaluations in ranks.run(size, losses, tiny_model, folder, dp_replicate=replicas):
        for (_, reduction, _), steps in found.items():
            of_sources = [set(figures) - {"train/loss"} for _, figures in steps]
            assert {"train/long/loss", "train/short/loss"} <= set.union(*of_sources)
            for batch, figures in steps:
                parts = {name: [i for i in batch if begin <= i < end] for name, (begin, end) in bounds.items()}
                expected = {f"train/{name}/loss": part for name, part in parts.items() if part} | {"train/loss": batch}
                assert set(figures) == set(expected)  # nothing of a source that the step has no token of
                for tag, samples in expected.items():
                    rows = [inputs.samples.table[i] for i in samples]
                    assert figures[tag] == pytest.approx(mean(rows, reduction), rel=2e-6), tag
        for figures in evaluations:
            assert figures == pytest.approx(evaluated, rel=1e-6)
    some = [figures for _, steps in found.items() for _, figures in steps]
    assert any("train/rare/loss" in figures for figures in some)
    assert any("train/rare/loss" not in figures for figures in some)


def one_of_each(mesh, model, folder):
    """Losses of a run with one source and one held-out set. Collective."""
    config = settings(model, folder)
    config.data.sources, config.data.eval_sources = config.data.sources[:1], config.data.eval_sources[:1]
    trainer = builders.trainer(mesh, config)
    context = RunContext(config, mesh, Console(False))
    figures = trainer.run_step() | held_out_loss.run(context, trainer.inputs, trainer.model, trainer.method, step=1)
    return {tag for tag in figures if tag.endswith("loss")}


def test_of_one_source_there_is_one_loss(tiny_model, folder):
    assert ranks.run(2, one_of_each, tiny_model, folder) == [{"train/loss", "eval/loss"}] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_sums_by_source_leave_the_gradient_as_it_is(dtype, weighted, in_chunks, tmp_path, monkeypatch):
    """To the bit; and it is that of torch's own sum of the losses."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 257 * 10)
    model = builders.frozen_model(tmp_path).to(dtype)
    weight = model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_()
    if in_chunks:
        head.in_chunks(model)
    batch = {
        "input_ids": torch.randint(3, 257, (2, 60), generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.arange(60).expand(2, -1),
        "sources": torch.arange(120).view(2, 60) % 3,
    }
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    batch["labels"][0, 0:30] = IGNORED
    weights = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) if weighted else None

    def summed(logits, labels):  # of a chunk, as a loss without its terms
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")

    def gradient(loss=per_token, sums=None):
        weight.grad = None
        total = objective.token_losses(model, batch, loss, weights, sums)
        total.backward()
        return total.item(), weight.grad.clone()

    sums = torch.zeros(3, dtype=torch.float64)
    total, plain = gradient()
    assert gradient(sums=sums)[0] == total
    assert torch.equal(gradient(sums=sums)[1], plain)
    if not weighted:
        assert torch.equal(gradient(summed)[1], plain)
    assert sums.sum().item() / 2 == pytest.approx(total, rel=1e-6)
    assert not math.isclose(*sums[:2].tolist())
    batch["labels"][batch["sources"] != 1] = IGNORED
    assert sums[1].item() / 2 == pytest.approx(objective.token_losses(model, batch, weights=weights).item(), rel=2e-3)


@pytest.mark.parametrize(
    ("reduction", "expected"), [("token", [3, 1, 0, 2]), ("sequence", [2, 1, 0, 1])], ids=["token", "sequence"]
)
def test_divisors_by_source(reduction, expected):
    """Of two packed rows: samples of sources 0, 1 and 0, then 3 and 2, of which the last has no label."""
    none = IGNORED
    batch = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]),
        "labels": torch.tensor([[5, 5, none, 5, none, none, 5, none], [5, 5, none, none, none, none, none, none]]),
        "sources": torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [3, 3, 3, 2, 2, 0, 0, 0]]),
    }
    assert objective.divisors(batch, reduction, 4).tolist() == expected
    assert objective.weigh(batch, reduction)[1] == sum(expected)
