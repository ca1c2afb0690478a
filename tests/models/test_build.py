"""Models as they are built, before they have weights."""

import builders
import pytest
from transformers import AutoConfig

from liftdist.errors import UserError
from liftdist.models import build
from liftdist.schema import ModelConfig


def test_fused_experts_are_refused(tmp_path):
    folder = builders.llama(
        tmp_path / "moe", None, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=10
    )
    config = ModelConfig(path=str(folder))
    with pytest.raises(UserError, match=r"experts.* fused experts are not supported"):
        build.build(build.check_type(folder, config), config)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_apart_where_the_head_is(tied):
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = build.build(AutoConfig.for_model("llama", **shape, tie_word_embeddings=tied), ModelConfig())
    assert build.own_embedding(model) is (None if tied else model.model.embed_tokens)
    model.get_output_embeddings = lambda: None  # it may multiply by the embedding itself
    assert build.own_embedding(model) is None
