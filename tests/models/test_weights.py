"""The digest of a model's weights."""

import shutil

import builders
import ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist.models import weights


def digest_of(mesh, folder, cache):
    return weights.digest(folder, cache)


def test_the_digest_follows_the_weights_alone(tmp_path):
    folder = builders.llama(tmp_path / "model")
    first = weights.digest(folder, tmp_path / "cache")
    assert weights.digest(folder, tmp_path / "cache") == first
    assert ranks.run(3, digest_of, folder, tmp_path / "other-cache") == [first] * 3
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert weights.digest(moved, tmp_path / "cache") == first
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(moved, max_shard_size="20KB")
    (moved / "model.safetensors").unlink()
    assert weights.digest(moved, tmp_path / "cache") == first  # other files, same tensors
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert weights.digest(folder, tmp_path / "cache") != first
