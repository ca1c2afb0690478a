"""Metrics of routers: which experts the tokens of a step went to."""

import builders
import pytest
import ranks
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from liftdist.data.batches import collate
from liftdist.training.routing import Routing


def train(mesh, config):
    trainer = builders.trainer(mesh, config)
    sequences = trainer.order.batch(0)
    before = trainer.routing.figures()
    assert (before["experts/busiest"], before["experts/unused"]) == (0.0, 1.0)
    trainer.run_step()
    found = trainer.routing.figures()
    with torch.no_grad():  # an evaluation
        trainer.model.eval()(torch.ones(1, 5, dtype=torch.int64))
    assert trainer.routing.figures()["experts/unused"] == 1.0
    return found, [collate(trainer.inputs.samples, [sequence]) for sequence in sequences]


@pytest.mark.parametrize("asked", [False, True])
def test_they_are_those_of_plain_transformers(asked, smollm2, tmp_path):
    folder = builders.llama(
        tmp_path / "model",
        smollm2,
        "qwen3_moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        hidden_size=48,
        output_router_logits=asked,
    )
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(folder, records, tmp_path, train=dict(batch_size=4, micro_batch_size=1))
    (one, batches), (other, _) = ranks.run(2, train, config)
    assert one == other
    model = AutoModelForCausalLM.from_pretrained(folder)
    counts = torch.zeros(2, 6, dtype=torch.int64)
    found = [model(input_ids=batch["input_ids"], output_router_logits=True).router_logits for batch in batches]
    logits = tuple(torch.cat(of_layer) for of_layer in zip(*found, strict=True))
    for layer, of_tokens in enumerate(logits):
        counts[layer] += torch.bincount(of_tokens.topk(2).indices.flatten(), minlength=6)
    assert one["experts/busiest"] == (counts.amax(1) / (counts.sum(1) / 6)).max()
    assert one["experts/unused"] == (counts == 0).float().mean()
    auxiliary = load_balancing_loss_func(logits, 6, 2).item()
    assert ("experts/auxiliary_loss" in one) == asked
    if asked:
        assert one["experts/auxiliary_loss"] == pytest.approx(auxiliary, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_goes_to_no_expert_counts_nowhere(dtype, smollm2, tmp_path, monkeypatch):
    """Without ``bincount``, in which the host waits for a GPU."""
    sizes = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48)
    folder = builders.llama(tmp_path / "model", smollm2, "qwen3_moe", **sizes)
    routing = Routing(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu"))
    monkeypatch.delattr(torch, "bincount")
    for _ in range(2):
        routing.count(0, torch.tensor([[0, 5], [0, 6], [0, 9]], dtype=dtype))
        routing.count(1, torch.tensor([[1, 2]], dtype=dtype))
        found = routing.figures()
        assert found["experts/busiest"] == pytest.approx(3 / (4 / 6))
        assert found["experts/unused"] == pytest.approx(8 / 12)


def test_a_dense_model_has_none(tmp_path):
    model = builders.frozen_model(tmp_path / "model")
    assert Routing(model, torch.device("cpu")).figures() == {}
