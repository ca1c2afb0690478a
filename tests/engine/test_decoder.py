"""The part of a model that a text passes through."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from liftdist.engine.decoder import layer_lists, text_decoder, towers
from liftdist.engine.matrices import principal_matrices

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def causal(model_type, **settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **settings))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(3, 4)


@pytest.mark.parametrize(
    ("make", "matrices"),
    {
        "a causal model": (lambda: causal("llama", intermediate_size=24), 14),
        "its decoder alone": (lambda: causal("llama", intermediate_size=24).model, 14),
        "transposed matrices": (lambda: causal("gpt2"), 8),
        "a head that is named decoder": (
            lambda: causal("modernbert-decoder", intermediate_size=24, pad_token_id=0),
            12,
        ),
        "a model in a module": (lambda: Wrapper(causal("llama", intermediate_size=24)), 16),  # its head, too
        "a plain module": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.Linear(3, 2)), 2),
    }.values(),
)
def test_what_is_trained(make, matrices):
    assert len(principal_matrices(make())) == matrices


def test_a_model_without_towers():
    model = causal("llama", intermediate_size=24)
    assert text_decoder(model) is model.model
    assert towers(model) == []
    assert layer_lists(model) == [model.model.layers]
