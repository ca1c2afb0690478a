"""Models that differ, their deltas, and a run: made once for all tests of this package."""

import dataclasses

import builders
import pytest
import ranks
import torch
from commands import liftdist
from transformers import AutoModelForCausalLM

from liftdist.deltas import file as delta_file
from liftdist.models import check


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
    return base, builders.changed_copy(base, folder / "one", 1), builders.changed_copy(base, folder / "two", 2)


@pytest.fixture(scope="module")
def deltas(folders, tmp_path_factory):
    """Deltas of the two changed models, by the command."""
    folder = tmp_path_factory.mktemp("deltas")
    for number, name in ((1, "one"), (2, "two")):
        liftdist("diff", folders[0], folders[number], "--output", folder / name, "--cache-dir", folder / "cache")
    return folder / "one", folder / "two", folder / "cache"


@pytest.fixture(scope="module")
def thirds(deltas):
    """The first of these deltas as three, which change different weights."""
    whole, found = delta_file.read(deltas[0]), []
    for number in range(3):

        def get(name, number=number):
            change = whole.get(name)
            part = slice(number, None, 3)
            return dataclasses.replace(
                change, indices=change.indices[part], values=change.values[part], base=change.base[part]
            )

        found.append(deltas[0].with_name(f"third-{number}"))
        delta_file.write(dataclasses.replace(whole, get=get), found[-1])
    return found


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
