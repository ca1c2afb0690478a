"""Layers that are recomputed, each, every n-th or selectively: which, how often, and to the bit."""

import dataclasses

import builders
import families
import pytest
import ranks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load
from liftdist.models.recompute import keep

CHOICES = (False, True, 2, 3, "selective")


class Calls(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.found[str(function)] = self.found.get(str(function), 0) + 1
        return function(*arguments, **(keywords or {}))


def calls(folder, choice):
    """Of a step of five layers: calls of each layer's norm in it, and of products, of attention and of SiLU in its backward."""
    model = builders.frozen_model(folder, num_hidden_layers=5).requires_grad_(True).train()
    keep(model, ModelConfig(activation_checkpointing=choice))
    norms = [0] * 5
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(
            lambda *_, number=number: norms.__setitem__(number, norms[number] + 1)
        )
    loss = model(torch.arange(16).view(2, 8)).logits.sum()
    with Calls() as counted:
        loss.backward()
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    return norms, [counted.found.get(name, 0) for name in ("aten.mm.default", attention, "aten.silu.default")]


def test_layers_are_recomputed_as_asked(tmp_path):
    found = {choice: calls(tmp_path, choice) for choice in CHOICES}
    products = found[False][1][0]
    assert found[False] == ([1] * 5, [products, 0, 0])
    assert found[True] == (
        [2] * 5,
        [products + 5 * 7 - 5, 5, 5],
    )  # but the last product of each, of which nothing is saved
    assert found[2] == ([2, 1, 2, 1, 2], [products + 3 * 7 - 3, 3, 3])
    assert found[3] == ([2, 1, 1, 2, 1], [products + 2 * 7 - 2, 2, 2])
    assert found["selective"] == ([2] * 5, [products, 0, 5])


def trained(mesh, config):
    found = []
    for choice in CHOICES:
        model = dataclasses.replace(config.model, activation_checkpointing=choice)
        made = builders.trainer(mesh, dataclasses.replace(config, model=model))
        found.append([*(made.run_step()["train/loss"] for _ in range(3)), builders.global_digest(made)])
    return found


@pytest.mark.parametrize(("family", "world_size"), [("gpt2", 2), pytest.param("llama", 1, marks=pytest.mark.slow)])
def test_training_is_the_same_to_the_bit(family, world_size, smollm2, records, tmp_path):
    """Also with dropout, of GPT-2."""
    sizes = dict(n_embd=48, n_head=4) if family == "gpt2" else {}
    model = builders.llama(tmp_path / "model", smollm2, family, num_hidden_layers=3, **sizes)
    settings = builders.config(model, records, tmp_path, train=dict(steps=3))
    for found in ranks.run(world_size, trained, settings):
        assert all(one == found[0] for one in found)


def refused(mesh, folder):
    model, _ = load(folder, ModelConfig(path=str(folder), dtype="float32", activation_checkpointing="selective"), mesh)
    loss = model.train()(torch.arange(16).view(2, 8)).logits.sum()
    with pytest.raises(
        UserError, match="a layer of this model changes the result of a product in place, which cannot be"
    ):
        loss.backward()


def test_a_product_that_is_changed_in_place_is_not_kept(tmp_path):
    """GPT-OSS adds the bias of an expert so."""
    ranks.run(1, refused, families.make(tmp_path / "model", "gpt_oss"))


@pytest.mark.parametrize("text", ["true", "false", "1", "4", "selective"])
def test_what_may_be_asked(text, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    found, _ = configs.load(tmp_path / "config.yaml", [f"model.activation_checkpointing={text}"])
    assert found.model.recomputed_every == {"true": 1, "false": 0, "1": 1, "4": 4, "selective": 1}[text]
    assert isinstance(found.model.activation_checkpointing, bool) == (text in ("true", "false"))


@pytest.mark.parametrize("text", ["0", "-2", "all"])
def test_what_may_not_be_asked(text, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\nselection: {density: 0.1}\n")
    with pytest.raises(UserError, match="must be true, false, selective, or a whole number n, .* got"):
        configs.load(tmp_path / "config.yaml", [f"model.activation_checkpointing={text}"])
