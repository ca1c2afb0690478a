"""Small models and configs for tests: real architectures with few weights."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from liftdist.config import Config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def llama(folder: Path, tokenizer_from: Path | None = None, model_type: str = "llama", **sizes) -> Path:
    """Save a randomly initialised model of a transformers architecture, float32 unless ``dtype`` is given."""
    dtype = sizes.pop("dtype", torch.float32)
    settings = dict(
        vocab_size=49152 if tokenizer_from else 257,
        hidden_size=50,
        intermediate_size=93,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=6,
        tie_word_embeddings=True,
        initializer_range=0.08,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(settings | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES if tokenizer_from else ():
        shutil.copy(tokenizer_from / name, folder / name)
    return folder


def config(model: Path, records: Path, folder: Path, /, **sections) -> Config:
    """A config for small tests; ``sections`` holds dicts of settings by section."""
    made = Config(run_dir=str(folder / "run"), cache_dir=str(folder / "cache"))
    made.model.path, made.model.dtype = str(model), "float32"
    made.data.path, made.data.max_length = str(records), 64
    made.selection.density, made.selection.filter_rank, made.selection.refresh_interval = 0.05, 4, 0
    made.optimizer.lr, made.optimizer.warmup_ratio = 1e-2, 0.0
    made.train.batch_size, made.train.micro_batch_size = 8, 2
    for section, values in sections.items():
        for key, value in values.items():
            assert hasattr(getattr(made, section), key)
            setattr(getattr(made, section), key, value)
    return made
