"""Models as they are built, before they have weights."""

import pytest
from transformers import AutoConfig

from liftdist.model_settings import ModelConfig
from liftdist.models import build


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_apart_where_the_head_is(tied):
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = build.build(AutoConfig.for_model("llama", **shape, tie_word_embeddings=tied), ModelConfig())
    assert build.own_embedding(model) is (None if tied else model.model.embed_tokens)
    model.get_output_embeddings = lambda: None  # it may multiply by the embedding itself
    assert build.own_embedding(model) is None
