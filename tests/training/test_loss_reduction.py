"""``train.loss_reduction``: loss and gradient on any ranks, micro-batches and packing are those of plain transformers."""

import json

import builders
import hooks
import pytest
import ranks
import torch
from transformers import AutoModelForCausalLM

from liftdist.console import Console
from liftdist.data.tokenised import IGNORED
from liftdist.distributed.collectives import gather
from liftdist.methods.lift import Lift
from liftdist.models import head
from liftdist.training import objective
from liftdist.training.inputs import prepare_inputs

WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "replicas": (2, 2)}
BATCH = 7  # sequences: some micro-batches of some ranks are empty
CUTS = [("token", 1), ("token", 3), *(("sequence", size) for size in (1, 2, 3, 4))]


def settings(model, folder, packing=False):
    return builders.config(
        model,
        folder / "mixed.jsonl",
        folder,
        data=dict(packing=packing),
        optimizer=dict(lr=1e-30),  # no weight changes
        train=dict(batch_size=BATCH, steps=1),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records whose replies have 2 to 52 tokens, and which end in the middle of a step's batch."""
    folder = tmp_path_factory.mktemp("reductions")
    lines = [{"prompt": f"{i} times", "completion": f" {i}" * (1 + i * i % 17)} for i in range(3 * BATCH - 2)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def objectives(mesh, model, folder):
    """For each way to cut the same batch into micro-batches: its samples, its loss, and its gradient by matrix. Collective."""
    found = {}
    for packing in (False, True):
        trainer = builders.trainer(mesh, settings(model, folder, packing))
        principal = trainer.method.principal
        gradients = []

        def keep(*_, principal=principal, gradients=gradients):
            gradients.append(principal.values.grad.clone())

        with hooks.around(Lift, "clip", before=keep):
            for reduction, micro_batch_size in CUTS:
                trainer.config.train.loss_reduction = reduction
                trainer.config.train.micro_batch_size = micro_batch_size
                trainer.step, trainer.consumed = 0, BATCH
                loss = trainer.run_step()["train/loss"]
                parts = gradients.pop().split([indices.numel() for indices in principal.indices])
                mine = {
                    matrix.name: (indices.long() + matrix.offset_local, part)
                    for matrix, indices, part in zip(principal.matrices, principal.indices, parts, strict=True)
                }
                samples = [sample for sequence in trainer.order.batch(BATCH) for sample in sequence]
                found[packing, reduction, micro_batch_size] = samples, loss, gather(mine)
    return found


@pytest.fixture(scope="module")
def reference(tiny_model, folder):
    """Loss and gradient of the mean over ``samples``, one at a time: of their own means, or of all of their labels."""
    rows = prepare_inputs(settings(tiny_model, folder), Console(False)).samples.table
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    known = {}

    def compute(samples, reduction):
        key = tuple(samples), reduction
        if key not in known:
            model.zero_grad()
            labels = [sum(label != IGNORED for label in rows[sample]["labels"][1:]) for sample in samples]
            total = 0.0
            for sample, count in zip(samples, labels, strict=True):
                row = {key: torch.tensor([rows[sample][key]]) for key in ("input_ids", "labels")}
                share = 1 / len(samples) if reduction == "sequence" else count / sum(labels)
                loss = model(**row).loss * share  # transformers takes the mean over the labels of the sample
                loss.backward()
                total += loss.item()
            known[key] = total, {name: param.grad.flatten().clone() for name, param in model.named_parameters()}
        return known[key]

    return compute


@pytest.mark.parametrize("world", WORLDS)
def test_loss_and_gradient_are_those_of_one_sample_at_a_time(world, tiny_model, folder, reference):
    ranks_, replicas = WORLDS[world]
    results = ranks.run(ranks_, objectives, tiny_model, folder, dp_replicate=replicas)
    for found in results:
        for (packing, reduction, micro_batch_size), (samples, loss, shards) in found.items():
            where = f"packing {packing}, {reduction}, micro-batches of {micro_batch_size}"
            assert (len(samples) > BATCH) == packing, where
            expected, gradient = reference(samples, reduction)
            assert loss == pytest.approx(expected, rel=1e-6), where
            assert abs(loss - reference(samples, {"token": "sequence", "sequence": "token"}[reduction])[0]) > 0.01
            difference = norm = 0.0
            for shard in shards:
                for name, (indices, part) in shard.items():
                    difference += float((part - gradient[name][indices]).square().sum())
                    norm += float(gradient[name][indices].square().sum())
            assert difference**0.5 <= 2e-6 * norm**0.5, where


# ---------------------------------------------------------------------------------------------------------------------
# The weights of the tokens of one micro-batch.

_ = IGNORED


@pytest.mark.parametrize(
    ("positions", "labels", "weights", "samples"),
    [
        ([[0, 1, 2, 3]], [[_, 5, 6, _]], [[0, 1 / 2, 1 / 2, 0]], 1),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[_, 5, 6, 7], [_, 5, _, _]], [[0, 1 / 3, 1 / 3, 1 / 3], [0, 1, 0, 0]], 2),
        ([[0, 1, 0, 1, 2]], [[5, _, 6, 7, _]], [[1, 0, 1 / 2, 1 / 2, 0]], 2),
        ([[0, 1, 2, 0, 1]], [[_, _, _, 5, _]], [[0, 0, 0, 1, 0]], 1),
        ([[0, 1, 0, 1, 2, 3]], [[5, _, _, 6, _, _]], [[1, 0, 0, 1, 0, 0]], 2),
        ([[0, 1, 2, 3, 4, 5]], [[5, _, 6, _, 7, _]], [[1 / 3, 0, 1 / 3, 0, 1 / 3, 0]], 1),
        ([[0, 0, 0, 1]], [[_, _, 5, _]], [[0, 0, 1, 0]], 1),
        ([[0, 1], [0, 1]], [[_, _], [_, _]], [[0, 0], [0, 0]], 0),
        ([[0]], [[_]], [[0]], 0),
    ],
    ids=[
        "one sample", "a row each", "packed", "packed, the first without labels", "padding after a packed one",
        "several replies", "samples of one token", "no labels", "no sequence",
    ],
)  # fmt: skip
def test_each_sample_counts_once(positions, labels, weights, samples):
    batch = {"position_ids": torch.tensor(positions), "labels": torch.tensor(labels)}
    found, count = objective.weigh(batch, "sequence")
    assert count == samples
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.tensor(weights, dtype=torch.float32))
    assert objective.weigh(batch, "token") == (None, int((batch["labels"] != IGNORED).sum()))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("gemma2", {"final_logit_softcapping": 30.0})],
    ids=["tied", "untied", "logits not in chunks"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_applied_within_chunks(model_type, sizes, dtype, tmp_path, monkeypatch):
    """Chunks end inside of samples; a bf16 gradient is no further from the float32 one than unweighted ones are."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 257 * 10)
    batch = {
        "input_ids": torch.randint(3, 257, (2, 60), generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.cat([torch.arange(length) for length in (7, 53, 25, 35)]).view(2, 60),
    }
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    batch["labels"][0, 0:3] = batch["labels"][1, 30:55] = IGNORED
    weights, samples = objective.weigh(batch, "sequence")
    assert samples == 4

    def run(dtype, in_chunks):
        model = builders.frozen_model(tmp_path, model_type, **sizes).to(dtype)
        if in_chunks and head.is_plain(model, torch.device("cpu")):
            head.in_chunks(model)
        assert hasattr(model, "chunked_loss") == (in_chunks and model_type == "llama")
        weight = model.get_decoder().layers[0].mlp.down_proj.weight.requires_grad_()
        loss = objective.token_losses(model, batch, weights=weights) / samples
        loss.backward()
        return loss.item(), weight.grad.float()

    loss, gradient = run(torch.float32, False)
    found, rounded = run(dtype, True)
    accuracy = 1e-6 if dtype == torch.float32 else 2e-2
    assert found == pytest.approx(loss, rel=accuracy)
    assert (rounded - gradient).norm() <= accuracy * gradient.norm()
