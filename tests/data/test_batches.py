"""Batches of packed and of padded samples."""

import builders
import pytest
import torch
from transformers import AutoModelForCausalLM

from liftdist.data import tokenised
from liftdist.data.batches import collate
from liftdist.data.chat import Encoder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_packed_samples_do_not_see_each_other(model_type, tmp_path, smollm2, tokenizer):
    """Losses of a packed sequence are those of its samples alone."""
    from liftdist.training.objective import token_losses

    folder = builders.llama(tmp_path / "model", smollm2, model_type, sliding_window=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    path = builders.write_records(tmp_path / "r.jsonl", 6)
    config = builders.config(folder, path, tmp_path).data
    samples = tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")
    with torch.no_grad():
        alone = sum(token_losses(model, collate(samples, [[i]])).item() for i in range(6))
        packed = token_losses(model, collate(samples, [[0, 1, 2], [3], [4, 5]])).item()
        padded = token_losses(model, collate(samples, [[i] for i in range(6)])).item()
        empty = token_losses(model, collate(samples, [])).item()
    assert packed == pytest.approx(alone, rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)
    assert empty == 0.0
