"""Models that cannot be trained are refused by name."""

import json
import shutil

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import build, check, weights
from liftdist.models.names import match


def broken(folder, how):
    """A copy of a good model, broken in one way."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = load_file(file)
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "not json":
        (folder / "config.json").write_text("{")
    elif how == "unknown type":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "wonder"}))
    elif how == "no type":
        (folder / "config.json").write_text("{}")
    elif how == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    elif how == "no weights":
        file.unlink()
    elif how == "pickled":
        file.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "garbage":
        file.write_bytes(b"garbage" * 100)
    elif how == "absent tensor":
        del tensors["model.norm.weight"]
        save_file(tensors, file)
    elif how == "left over":
        save_file(tensors | {"model.layers.9.extra": torch.ones(2)}, file)
    elif how == "wrong shape":
        save_file(tensors | {"model.norm.weight": torch.ones(3)}, file)
    elif how == "integer weights":
        name = "model.layers.0.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    elif how == "missing shard":
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        (folder / check.INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("how", "problem"),
    {
        "no config": "holds no config.json",
        "empty": "holds no config.json (it is empty)",
        "not json": "config.json: Expecting",
        "unknown type": "model_type 'wonder' is not a causal language model known to transformers",
        "no type": "has no model_type; model.path must be the folder of a Hugging Face model",
        "quantised": "quantised weights (gptq) cannot be read; use the unquantised model",
        "no weights": "holds no model.safetensors",
        "pickled": "pickled weights (pytorch_model.bin) are not loaded",
        "truncated": "damaged weights: model.safetensors has",
        "garbage": "damaged weights: model.safetensors is not a complete safetensors file",
        "absent tensor": "model.norm.weight is not in the checkpoint",
        "left over": "model.layers.9.extra of the checkpoint is not in the model",
        "wrong shape": "model.norm.weight is [3] in the checkpoint, [50] in the model",
        "integer weights": "model.layers.0.mlp.up_proj.weight has dtype I8: quantised weights are not supported",
        "missing shard": "damaged weights: ",
    }.items(),
)
def test_what_is_not_supported_is_refused_by_name(how, problem, tmp_path):
    folder = broken(builders.llama(tmp_path / "model"), how)
    config = ModelConfig(path=str(folder))
    with pytest.raises(UserError) as caught:
        match(build.build(build.check_type(folder, config), config), weights.ModelFolder(folder))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
