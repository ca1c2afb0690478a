"""Metrics of routers: which experts the tokens of a step went to."""

import builders
import ranks
import torch
from transformers import AutoModelForCausalLM

from liftdist.data.batches import collate
from liftdist.training.routing import Routing


def train(mesh, config):
    trainer = builders.trainer(mesh, config)
    sequences = trainer.order.batch(0)
    assert trainer.routing.figures() == {"experts/busiest": 0.0, "experts/unused": 1.0}
    trainer.run_step()
    found = trainer.routing.figures()
    with torch.no_grad():  # an evaluation
        trainer.model.eval()(torch.ones(1, 5, dtype=torch.int64))
    assert trainer.routing.figures()["experts/unused"] == 1.0
    return found, [collate(trainer.inputs.samples, [sequence]) for sequence in sequences]


def test_they_are_those_of_plain_transformers(smollm2, tmp_path):
    folder = builders.llama(
        tmp_path / "model",
        smollm2,
        "qwen3_moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        hidden_size=48,
    )
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(folder, records, tmp_path, train=dict(batch_size=4, micro_batch_size=1))
    (one, batches), (other, _) = ranks.run(2, train, config)
    assert one == other
    model = AutoModelForCausalLM.from_pretrained(folder)
    counts = torch.zeros(2, 6, dtype=torch.int64)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], output_router_logits=True).router_logits
        for layer, of_tokens in enumerate(logits):
            counts[layer] += torch.bincount(of_tokens.topk(2).indices.flatten(), minlength=6)
    assert one["experts/busiest"] == (counts.amax(1) / (counts.sum(1) / 6)).max()
    assert one["experts/unused"] == (counts == 0).float().mean()


def test_a_dense_model_has_none(tmp_path):
    model = builders.frozen_model(tmp_path / "model")
    assert Routing(model, torch.device("cpu")).figures() == {}
