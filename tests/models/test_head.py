"""Heads whose logits are more than a product are noticed."""

import builders
import pytest
import torch

from liftdist.models.head import is_plain

CPU = torch.device("cpu")


class Doubling(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_of_its_own_kind_is_noticed(tmp_path):
    model = builders.frozen_model(tmp_path)
    head = Doubling(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert not is_plain(model, CPU)


def test_a_decoder_that_is_given_more_than_tokens_is_noticed(tmp_path, monkeypatch):
    model = builders.frozen_model(tmp_path)
    forward, embed = model.forward, model.get_input_embeddings()

    def scaled(input_ids, **others):
        return forward(inputs_embeds=3 * embed(input_ids), **others)

    monkeypatch.setattr(model, "forward", scaled)
    assert not is_plain(model, CPU)


def test_trying_compiles_nothing(tmp_path):
    model = builders.frozen_model(tmp_path)
    for layer in model.get_decoder().layers:
        layer.compile()
    torch._dynamo.utils.counters.clear()
    assert is_plain(model, CPU)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize(
    ("model_type", "settings", "plain"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("gemma", {}, True),
        ("gemma2", {"final_logit_softcapping": 30.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("phi", {"head_dim": 8}, False),  # its head has a bias
    ],
)
def test_logits_that_are_more_than_a_product_are_noticed(model_type, settings, plain, tmp_path):
    assert is_plain(builders.frozen_model(tmp_path, model_type, **settings), CPU) == plain
