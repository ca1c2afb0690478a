"""Models that differ, their deltas, and a run: made once for all tests of this package."""

import shutil

import builders
import pytest
import ranks
import torch
from commands import liftdist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist.models import check


def changed_copy(folder, target, seed=0, share=0.05):
    """A copy of a model folder with other values at a share of the places of every linear weight."""
    shutil.copytree(folder, target)
    chance = torch.Generator().manual_seed(seed)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "_proj" in name:
                flat = tensor.view(-1)
                places = torch.randperm(flat.numel(), generator=chance)[: round(share * flat.numel())]
                flat[places] = (flat[places].float() * 1.5 + 0.01).to(flat.dtype)
        save_file(tensors, file, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm2):
    """A bf16 model in several files, and two others that were made from it."""
    folder = tmp_path_factory.mktemp("models")
    base = builders.llama(
        folder / "base",
        smollm2,
        dtype=torch.bfloat16,
        hidden_size=100,
        intermediate_size=203,
        num_key_value_heads=5,
        head_dim=20,
    )
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="9MB")
    (base / "model.safetensors").unlink()
    assert (base / check.INDEX).exists()
    (base / "notes").mkdir()
    (base / "notes" / "readme.md").write_text("kept")
    return base, changed_copy(base, folder / "one", 1), changed_copy(base, folder / "two", 2)


@pytest.fixture(scope="module")
def deltas(folders, tmp_path_factory):
    """Deltas of the two changed models, by the command."""
    folder = tmp_path_factory.mktemp("deltas")
    for number, name in ((1, "one"), (2, "two")):
        liftdist("diff", folders[0], folders[number], "--output", folder / name, "--cache-dir", folder / "cache")
    return folder / "one", folder / "two", folder / "cache"


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run in bf16 whose principal weights have changed twice, and the weights it ended with."""
    folder = tmp_path_factory.mktemp("trained")
    config = builders.config(
        folders[0], builders.write_records(folder / "records.jsonl"), folder,
        model=dict(dtype="bfloat16"), selection=dict(refresh_interval=2), optimizer=dict(lr=0.05), train=dict(steps=5),
    )  # fmt: skip
    (parameters,) = ranks.run(1, builders.train_and_save, config)
    return folder, parameters
