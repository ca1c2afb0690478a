"""Selections by gradients, against a dense version on one process, on any ranks; continued to the bit over a refresh."""

from pathlib import Path

import builders
import commands
import hooks
import pytest
import ranks
import torch
import torch.nn.functional as F
from test_full import SIZES
from test_world_size import global_masks
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.data.order import BatchOrder
from liftdist.engine.criteria.gradient import Gradient
from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.training.inputs import prepare_inputs

BATCHES, ROWS = 3, 4
KINDS = {
    "gradient": dict(criterion="gradient"),
    "global": dict(criterion="gradient", budget="global_threshold"),
    "sensitivity": dict(criterion="sensitivity"),
    "experts": dict(criterion="sensitivity"),
}
WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "2x2": (4, 2)}


def settings_of(kind, folder, **train):
    return builders.config(
        Path(folder) / ("experts" if kind == "experts" else "dense"),
        Path(folder) / "records.jsonl",
        Path(folder) / f"run-{kind}",
        selection=dict(refresh_interval=2, gradient_batches=BATCHES) | KINDS[kind],
        train=dict(steps=5, batch_size=6, micro_batch_size=ROWS, seed=3) | train,
        optimizer=dict(lr=5e-3),
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    made = tmp_path_factory.mktemp("gradients")
    builders.write_records(made / "records.jsonl")
    builders.llama(made / "dense", tiny_model)
    builders.llama(made / "experts", tiny_model, **SIZES["experts"])
    return made


def selected(mesh, folder):
    """The selections of all kinds; for each gradient that is taken, how many exist."""
    found, alive = {}, []
    for kind in KINDS:
        made = builders.trainer(mesh, settings_of(kind, folder))
        params = made.model.parameters

        def count(*_, params=params):
            alive.append(sum(param.grad is not None for param in params()))

        with hooks.around(Gradient, "add", before=count):
            made.method.principal.refresh(number=1)
        assert made.method.principal.values.grad.abs().sum() == 0
        found[kind] = global_masks(made.method.principal), sum(param.grad is not None for param in params())
    assert len(alive) == 2 * BATCHES * 14  # of two kinds, each parameter
    return found, max(alive)


def dense(kind, folder):
    """The sets by plain autograd."""
    settings = settings_of(kind, folder)
    samples = prepare_inputs(settings, Console(False)).samples
    model = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    places = principal_matrices(model)
    mean, spread = (dict.fromkeys(places, 0.0) for _ in range(2))
    for gradients in batches_of_gradients(samples, model):
        for name, gradient in gradients.items():
            weight = part_of(places[name].param, places[name])
            if settings.selection.criterion == "gradient":
                mean[name], spread[name] = mean[name] + gradient**2, 1.0
            else:
                mean[name] = 0.85 * mean[name] + 0.15 * (weight * gradient).abs()
                spread[name] = 0.85 * spread[name] + 0.15 * ((weight * gradient).abs() - mean[name]).abs()
    scores = {name: mean[name] * spread[name] for name in places}
    if kind == "global":
        scaled = {name: score / score.square().mean().sqrt() for name, score in scores.items()}
        total = sum(round(0.05 * score.numel()) for score in scores.values())
        threshold = torch.cat([score.flatten() for score in scaled.values()]).topk(total).values[-1]
        return {name: (score >= threshold).flatten().nonzero().squeeze(1).tolist() for name, score in scaled.items()}
    return {name: sorted(s.flatten().topk(round(0.05 * s.numel())).indices.tolist()) for name, s in scores.items()}


def part_of(tensor, place):
    return tensor.detach().view(-1, place.columns)[place.first_row : place.first_row + place.rows]


def batches_of_gradients(samples, model):
    """The gradient of each matrix, by name, of each batch."""
    sequences = BatchOrder(samples.lengths, 3, False, 64, BATCHES * ROWS).batch(0)
    places = principal_matrices(model)
    for begin in range(0, len(sequences), ROWS):
        model.zero_grad()
        rows = [samples.table[sample] for sequence in sequences[begin : begin + ROWS] for sample in sequence]
        total, labels = 0.0, 0
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"][1:])
            total = total + F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
            labels += int((targets != -100).sum())
        (total / labels).backward()
        yield {name: part_of(place.param.grad, place).clone() for name, place in places.items()}


@pytest.fixture(scope="module")
def expected(folder):
    return {kind: dense(kind, folder) for kind in KINDS}


@pytest.mark.parametrize("world", ["2", *(pytest.param(world, marks=pytest.mark.slow) for world in ("1", "3", "2x2"))])
def test_sets_are_those_of_the_dense_gradients(world, folder, expected):
    size, replicas = WORLDS[world]
    (first, alive), *others = ranks.run(size, selected, folder, dp_replicate=replicas)
    for kind, (sets, left) in first.items():
        assert left == 0  # no dense gradient
        assert sum(map(len, sets.values())) == sum(map(len, expected[kind].values()))
        same = sum(len(set(sets[name]) & set(expected[kind][name])) for name in sets)
        assert same >= (0.98 if kind == "global" else 0.999) * sum(map(len, sets.values())), kind
    assert alive < 7  # besides the one that is being taken: less than the matrices of a layer
    assert all(other[0] == first for other in others)


def refreshed(made):
    return [made.run_step()["selection/survived"], made.run_step()["train/loss"], builders.global_digest(made)]


def test_it_continues_over_a_refresh(folder):
    settings = settings_of("sensitivity", folder)
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 1, refreshed)
    assert 0.2 < expected[0] < 1
    assert found == expected
    (on_one,) = ranks.run(1, builders.continued, settings, refreshed)
    assert on_one[:2] == pytest.approx(expected[:2], rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["selection.gradient_batches=4"], "selection.gradient_batches: is used by selection.criterion=gradient, sensitivity"),
        (["selection.criterion=gradient", "train.loss=asft"], "train.loss: cannot be asft with selection.criterion=gradient"),
    ],
)  # fmt: skip
def test_settings_that_would_not_be_used_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)


def test_it_is_not_selected_ahead(tiny_model, records, tmp_path):
    config = commands.write_config(tmp_path, tiny_model, records, selection=dict(criterion="gradient"))
    refused = commands.user_error(commands.run_command("select", config))
    assert "selection.criterion=gradient selects by gradients, when a run starts, and keeps no selection" in refused


def recomputing(mesh, folder):
    """The selection with and without activations that are kept, and how often a layer ran for it."""
    found = []
    for recomputed in (False, True):
        settings = settings_of("gradient", folder)
        settings.model.activation_checkpointing = recomputed
        made = builders.trainer(mesh, settings)
        calls = []
        made.model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.method.principal.refresh()
        found.append((global_masks(made.method.principal), len(calls), made.model.training))
    return found


def test_layers_are_recomputed_as_in_training(folder):
    ((kept, calls, before), (recomputed, more, after)), *_ = ranks.run(2, recomputing, folder)
    assert recomputed == kept
    assert (calls, more) == (BATCHES, 2 * BATCHES)
    assert before
    assert after


@pytest.mark.parametrize("setting", ["activation_checkpointing", "offload_activations"])
def test_dropout_in_layers_that_keep_less_is_refused(setting, tiny_model, tmp_path):
    model = builders.llama(tmp_path / "model", tiny_model, "gpt2", n_embd=48, n_head=4)
    builders.write_records(tmp_path / "records.jsonl")
    settings = builders.config(model, tmp_path / "records.jsonl", tmp_path, selection=dict(criterion="gradient"))
    setattr(settings.model, setting, True)
    with pytest.raises(AssertionError, match=f"without dropout, which layers .* would have; set model.{setting}=false"):
        ranks.run(1, builders.trainer, settings)
