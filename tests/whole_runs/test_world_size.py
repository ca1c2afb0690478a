"""The same run on 1, 2, 3 and 4 ranks, with and without replicas, against dense LIFT on one process."""

import builders
import pytest
import ranks
import torch
from reference import DenseLift, linear_of
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from bench.traffic import Traffic
from liftdist.console import Console
from liftdist.distributed.collectives import gather
from liftdist.models import build
from liftdist.training.inputs import prepare_inputs

STEPS, REFRESH = 20, 7
SETTINGS = {
    "optimizer": dict(lr=5e-3, schedule="linear", warmup_ratio=0.1),
    "selection": dict(refresh_interval=REFRESH),
    "train": dict(steps=STEPS, batch_size=8, micro_batch_size=2, seed=3),
}
WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "2x2": (4, 2), "replicas": (2, 2)}


def global_masks(principal):
    """{name: sorted flat indices in the whole matrix}, put together from all shards."""
    mine = {
        matrix.name: (indices.long() + matrix.offset_local).tolist()
        for matrix, indices in zip(principal.matrices, principal.indices, strict=True)
    }
    return {name: sorted(set().union(*(share[name] for share in gather(mine)))) for name in mine}


def run_training(mesh, model_folder, data, folder):
    config = builders.config(model_folder, data, folder, **SETTINGS)
    trainer = builders.trainer(mesh, config)
    model, principal = trainer.model, trainer.method.principal
    masks, losses, dense, traffic, flat_bytes = [global_masks(principal)], [], [], [], []
    for _ in range(STEPS):
        counter = Traffic()
        with counter:
            losses.append(trainer.run_step()["train/loss"])
        dense.append(sum(param.grad is not None for param in model.parameters()))
        traffic.append(counter.by_group)
        flat_bytes.append(principal.values.numel() * 4)
        if trainer.step % REFRESH == 0:
            masks.append(global_masks(principal))
    weights = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in build.tensors(model).items()
    }
    group = mesh.replicate_group
    return dict(
        losses=losses,
        masks=masks,
        weights=weights,
        dense_gradients_left=dense,
        values=principal.values.detach().clone(),
        between_replicas=[step.get(group.group_name, {}) if group else {} for step in traffic],
        flat_bytes=flat_bytes,
        shard_rows=[matrix.rows_local.shape[0] for matrix in principal.matrices],
    )


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):

    folder = tmp_path_factory.mktemp("world")
    data = builders.write_records(folder / "records.jsonl")
    results = {}
    for world, (size, replicas) in WORLDS.items():
        results[world] = ranks.run(size, run_training, tiny_model, data, folder / world, dp_replicate=replicas)
    return results


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory):

    folder = tmp_path_factory.mktemp("reference")
    config = builders.config(tiny_model, builders.write_records(folder / "records.jsonl"), folder, **SETTINGS)
    inputs = prepare_inputs(config, Console(False))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    names = linear_of(model)
    selected = {name: round(0.05 * model.get_parameter(name).numel()) for name in names}
    warmup = 2
    lrs = [5e-3 * (step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)) for step in range(STEPS)]
    lift = DenseLift(model, names, selected, config.selection.filter_rank, REFRESH, lrs, (0.9, 0.95), 1e-6)
    from liftdist.data.order import BatchOrder

    order = BatchOrder(inputs.samples.lengths, 3, False, 64, 8)
    masks, losses = [lift.masks], []
    for step in range(STEPS):
        rows = [inputs.samples.table[sample] for sequence in order.batch(8 * step) for sample in sequence]
        losses.append(lift.run_step([(row["input_ids"], row["labels"]) for row in rows]))
        if lift.step % REFRESH == 0:
            masks.append(lift.masks)
    masks = [{name: mask.flatten().nonzero().squeeze(1).tolist() for name, mask in each.items()} for each in masks]
    return dict(losses=losses, masks=masks, weights={n: p.detach() for n, p in model.named_parameters()})


def relative(a, b):
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()).item()


@pytest.mark.parametrize("world", WORLDS)
def test_agrees_with_dense_lift(runs, reference, world):
    run = runs[world][0]
    assert run["masks"][0] == reference["masks"][0]
    for later, expected in zip(run["masks"][1:], reference["masks"][1:], strict=True):
        same = sum(len(set(later[name]) & set(expected[name])) for name in expected)
        assert same >= 0.9999 * sum(map(len, expected.values()))
    assert run["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert sum(reference["losses"][-5:]) < sum(reference["losses"][:5]) - 5 * 0.3  # something was learned
    for name, weight in run["weights"].items():
        assert relative(weight, reference["weights"][name]) < 1e-4, name


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_sees_the_same_run(runs, world):
    for other in runs[world][1:]:
        assert other["losses"] == runs[world][0]["losses"]
        assert other["masks"] == runs[world][0]["masks"]


def test_masks_change_and_untrained_weights_do_not(runs, reference, tiny_model):
    first, *later = reference["masks"]
    assert any(mask != first for mask in later)
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ever = {name: sorted(set().union(*(masks[name] for masks in reference["masks"]))) for name in first}
    for name, weight in runs["3"][0]["weights"].items():
        moved = (weight != before.get_parameter(name)).flatten().nonzero().squeeze(1).tolist()
        assert set(moved) <= set(ever.get(name, [])), name
        assert not ever.get(name) or len(moved) > 0.9 * len(ever[name])


def test_some_ranks_own_no_row(runs):
    assert 0 in runs["4"][3]["shard_rows"]
    assert len({tuple(rank["shard_rows"]) for rank in runs["3"]}) > 1  # rows do not divide evenly


@pytest.mark.parametrize("world", WORLDS)
def test_no_dense_gradient_is_left(runs, world):
    for rank in runs[world]:
        assert rank["dense_gradients_left"] == [0] * STEPS


@pytest.mark.parametrize("world", ["2x2", "replicas"])
def test_only_the_flat_gradient_travels_between_replicas(runs, world):
    for rank in runs[world]:
        for number, step in enumerate(rank["between_replicas"], 1):
            # a refresh sends indices, too; where the replicas are all ranks, loss and label count (16 B) use their group
            if number % REFRESH:
                assert list(step) == ["all_reduce"]
                assert step["all_reduce"][1] - rank["flat_bytes"][number - 1] == (16 if world == "replicas" else 0)


def test_replicas_stay_equal(runs):
    first, second, third, fourth = runs["2x2"]
    assert torch.equal(first["values"], third["values"])
    assert torch.equal(second["values"], fourth["values"])
