"""Activations on the host: what travels, what stays, and that training is the same to the bit."""

import dataclasses
import functools

import builders
import hooks
import pytest
import ranks
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import offload
from liftdist.models.recompute import keep
from liftdist.planning.live_bytes import LiveBytes

TOKENS, WIDTH = 11, 16


class Layer(nn.Module):
    """One product that q, k and v are views of, a mask that all layers share, and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out.weight.requires_grad_(False)

    def forward(self, hidden, mask=None):
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)) * mask
        return hidden + self.out(torch.softmax(scores, -1) @ v)


def backward(compute, copied=None):
    """Gradients of two layers, and the bytes of activations on the host between forward and backward."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    mask = torch.rand(TOKENS, TOKENS, generator=generator)
    entries = []
    with (
        hooks.around(offload, "to_host", before=lambda storage: entries.append(storage.numel())),
        LiveBytes() as live,
    ):
        states = hidden
        for layer in layers:
            states = compute(functools.partial(layer, mask=mask), states)
        held = live.offloaded
        states.square().sum().backward()
    assert live.offloaded == 0
    gradients = [param.grad for layer in layers for param in layer.parameters() if param.requires_grad]
    return [hidden.grad, *gradients], entries, held


def recomputed(layer, *arguments):
    return checkpoint(layer, *arguments, use_reentrant=False)


def test_each_storage_travels_once_and_no_weight_or_mask_does():
    plain, none, _ = backward(lambda layer, *arguments: layer(*arguments))
    assert none == []
    gradients, entries, held = backward(functools.partial(offload.offloaded, lambda layer, hidden: layer(hidden)))
    assert all(torch.equal(*pair) for pair in zip(gradients, plain, strict=True))
    of_a_layer = [TOKENS * WIDTH, 3 * TOKENS * WIDTH, TOKENS * TOKENS]  # the input, q with k and v, the softmax
    assert sorted(entries) == sorted(2 * of_a_layer)
    assert held == 4 * sum(entries)


def test_of_a_layer_that_is_recomputed_its_input_travels():
    plain, *_ = backward(recomputed)
    gradients, entries, held = backward(functools.partial(offload.offloaded, recomputed))
    assert all(torch.equal(*pair) for pair in zip(gradients, plain, strict=True))
    assert entries == 2 * [TOKENS * WIDTH]
    assert held == 4 * sum(entries)


def test_a_tensor_comes_back_with_its_strides():
    tensor = torch.randn(7, 5).t().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        found = offload.offloaded(
            lambda layer, hidden: layer(hidden), lambda hidden: (hidden.exp()[1:]).square(), tensor
        )
    saved = found.grad_fn._saved_self
    assert saved.stride() == tensor.stride()
    assert torch.equal(saved, tensor.exp()[1:])


KINDS = {
    "packed and kept gathered": ("llama", dict(model=dict(keep_gathered=1), data=dict(packing=True))),
    "recomputed with dropout": ("gpt2", dict(model=dict(activation_checkpointing=True))),
    "experts on a quantised base": ("qwen3_moe", dict(model=dict(base_dtype="int8"))),
    "adapters of a loss with the base": ("llama", dict(lora=dict(variant="dora"), train=dict(loss="asft"))),
}
SIZES = {
    "llama": {},
    "gpt2": dict(n_embd=48, n_head=4),
    "qwen3_moe": dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48, head_dim=12, num_attention_heads=4
    ),
}  # fmt: skip


def trained(mesh, config):
    """Losses and weights of a run with and without activations on the host, and whether some were there."""
    found = []
    for offloads in (False, True):
        model = dataclasses.replace(config.model, offload_activations=offloads)
        made = builders.trainer(mesh, dataclasses.replace(config, model=model))
        sent = []

        def note(storage, model=made.model, sent=sent):
            gathered = {param.untyped_storage() for param in model.parameters() if not isinstance(param, DTensor)}
            sent.append(storage.untyped_storage() in gathered)

        with hooks.around(offload, "to_host", before=note):
            losses = [made.run_step()["train/loss"] for _ in range(made.steps)]
        assert bool(sent) == offloads
        assert not any(sent)
        found.append((losses, builders.global_digest(made)))
    return found


@pytest.mark.parametrize(("kind", "world_size"), [(next(iter(KINDS)), 1), *((kind, 2) for kind in KINDS)])
def test_training_is_the_same_to_the_bit(kind, world_size, smollm2, records, tmp_path):
    family, sections = KINDS[kind]
    model = builders.llama(tmp_path / "model", smollm2, family, **SIZES[family])
    config = builders.config(model, records, tmp_path, **sections)
    config.method, config.train.steps = "lora" if "lora" in sections else "lift", 3
    for without, offloaded in ranks.run(world_size, trained, config):
        assert offloaded == without


def test_layers_that_transformers_cannot_recompute_are_refused(tmp_path):
    model = builders.frozen_model(tmp_path)
    keep(model, ModelConfig(offload_activations=True))
    model.model.layers[1] = nn.Identity()
    with pytest.raises(UserError, match="model.offload_activations=true: Identity of LlamaForCausalLM is no Gradient"):
        keep(model, ModelConfig(offload_activations=True))


def test_it_is_refused_of_compiled_layers():
    found = dict(ModelConfig(offload_activations=True, compile=True).problems())
    assert found == {"offload_activations": "must be false with model.compile, whose kernels decide what is kept"}
