"""Which modules get adapters, and which are refused; adapters that a model does not use."""

import sys

import families
import peft
import pytest
import torch
from torch import nn

from liftdist.engine.dense import DenseWeights
from liftdist.errors import UserError
from liftdist.method_settings import LoraConfig
from liftdist.methods import lora
from liftdist.model_settings import ModelConfig
from liftdist.models import adapters, build, names
from liftdist.schema import Config


def injected(family, patterns=("*",)):
    model = build.build(families.config(family), ModelConfig(path="none"))
    stored = names.same(build.tensors(model))
    adapters.inject(model, LoraConfig(), patterns)
    return model, stored, adapters.renamed(stored, model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe", "falcon", "llama4"])
def test_every_tensor_has_the_place_in_the_files_that_it_had(family):
    model, before, after = injected(family)
    assert after.pieces.keys() == build.tensors(model).keys()
    new = {name for name, pieces in after.pieces.items() if not pieces}
    assert new == adapters.parameters(model).keys()
    assert {pieces for pieces in after.pieces.values() if pieces} == set(before.pieces.values())
    assert set(after.stored.values()) == set(before.stored.values())
    assert {name for name, param in model.named_parameters() if param.requires_grad} == new


@pytest.mark.parametrize(
    ("family", "patterns", "problem"),
    [
        ("zamba2", ["*"], "shared_transformer.self_attn.q_proj shares its weight with another module; leave it out"),
        ("mamba", ["*"], "Module 'out_proj' is incompatible with Mamba-based models"),
        ("deepseek_v3", ["*"], "lora.modules: peft has no adapters for model.layers.0.mlp.down_proj"),
        ("qwen3_moe", ["*.experts.*"], "is a part of model.layers.0.mlp.experts.gate_up_proj, as matrices of experts are"),
        ("llama", ["*.none"], "no linear module fits *.none"),
    ],
)  # fmt: skip
def test_modules_that_cannot_have_adapters_are_refused(family, patterns, problem):
    with pytest.raises(UserError) as caught:
        injected(family, patterns)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(rank=17, variant="pissa"), r"lora.rank=17: must be at most the sides of .*k_proj, \[16, 32\], with pissa"),
        (dict(rank=33, variant="miss"), r"lora.rank=33: must be at most the columns of .*q_proj, \[32, 32\], with miss"),
        (dict(rank=6, variant="miss", miss_init="bat"), r"lora.rank=6: must divide the sides of .*q_proj, .* with bat"),
        (dict(variant="miss", miss_init="mini", mini_r=5), r"lora.mini_r=5: must divide the rows of .*q_proj, .* with mini"),
        (dict(rank=17, variant="eva"), r"lora.rank=17 with lora.eva.rho=2: must give at most as many ranks as the columns"),
        (dict(rank=11, variant="shira"), r"lora.rank=11: must be at most m n / \(m \+ n\) of .*k_proj, .*, with shira"),
    ],
)  # fmt: skip
def test_a_matrix_that_is_too_small_is_refused(settings, problem):
    model = build.build(families.config("llama"), ModelConfig(path="none"))
    with pytest.raises(UserError, match=problem):
        adapters.inject(model, LoraConfig(**settings), ["*"])


@pytest.mark.parametrize("variant", ["miss", "shira"])
def test_a_transposed_module_is_refused_where_peft_has_none(variant):
    model = build.build(families.config("gpt2"), ModelConfig(path="none"))
    with pytest.raises(UserError, match=r"lora.modules: Target module Conv1D\(.*\) is not supported"):
        adapters.inject(model, LoraConfig(variant=variant, rank=2), ["*"])


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7)])
def test_places_are_those_that_peft_draws(rows, columns):
    model = nn.ModuleDict({"linear": nn.Linear(columns, rows)})
    peft.inject_adapter_in_model(peft.ShiraConfig(r=2, random_seed=5, target_modules=["linear"]), model)
    found = adapters.drawn(LoraConfig(rank=2, variant="shira"), rows, columns, 5)
    assert torch.equal(found, model["linear"].shira_indices["default"])
    assert not torch.equal(found, adapters.drawn(LoraConfig(rank=2, variant="shira"), rows, columns, 6))


def test_what_is_refused_by_default_can_be_left_out():
    model, _, _ = injected("deepseek_v3", ["*.self_attn.*"])
    assert all(".self_attn." in name for name in adapters.layers(model))


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora needs the library peft: pip install 'liftdist\[lora\]'"):
        adapters.peft_config(LoraConfig(), [])
    config = Config(method="lora")
    assert ("method", "lora needs the library peft: pip install 'liftdist[lora]'") in list(config.problems())


class Gated(nn.Module):
    """Calls one of its linear modules, and uses the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.used = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.called(x) @ self.used.weight


def test_adapters_that_take_no_part_are_named_once():
    model, said = Gated().to("meta"), []
    adapters.inject(model, LoraConfig(), ["*"])
    model.to_empty(device="cpu")
    method = lora.Lora(Config(method="lora"), DenseWeights(model), [], adapters.layers(model), said.append)
    for _ in range(2):
        model(torch.ones(2, 5)).sum().backward()
        method.reduce(torch.ones(()))
    assert said == [
        "adapters of used took no part in the first step: where a model uses weights in its own way, leave such modules out of "
        "lora.modules"
    ]


@pytest.mark.parametrize("variant", ["dora", "shira"])
def test_all_but_magnitudes_decay(variant):
    model = nn.ModuleDict({"linear": nn.Linear(5, 5)}).to("meta")
    adapters.inject(model, LoraConfig(rank=2, variant=variant), ["*"])
    model.to_empty(device="cpu")
    config = Config(method="lora", lora=LoraConfig(rank=2, variant=variant))
    config.optimizer.weight_decay = 0.1
    method = lora.Lora(config, DenseWeights(model), [], adapters.layers(model), print)
    found = {param.shape: group["weight_decay"] for group in method.optimizer.param_groups for param in group["params"]}
    expected = {(20,): 0.1} if variant == "shira" else {(2, 5): 0.1, (5, 2): 0.1, (5,): 0.0}
    assert found == expected


@pytest.mark.parametrize("names", [["model.a.q"], ["model.a.q", "model.b.q"], ["model.a.q", "tower.model.a.q"]])
def test_targets_are_the_modules_and_no_others(names):
    model = torch.nn.ModuleDict({"tower": torch.nn.Module(), "model": torch.nn.Module()})
    for name in ("model.a.q", "model.b.q", "model.b.k", "tower.v"):
        at = model
        *path, last = name.split(".")
        for part in path:
            at.add_module(part, at.get_submodule(part) if part in dict(at.named_children()) else torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, torch.nn.Linear(3, 3))
    if "tower.model.a.q" in names:
        model["tower"].model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": torch.nn.Linear(3, 3)})})
        with pytest.raises(UserError, match="name ends with that of one"):
            adapters.targets(["model.a.q"], model)
        names = ["model.a.q", "tower.model.a.q", "model.b.q"]
    found = adapters.targets(names, model)
    peft.inject_adapter_in_model(adapters.peft_config(LoraConfig(), found), model)
    assert list(adapters.layers(model)) == sorted(names, key=list(adapters.layers(model)).index)
    assert set(adapters.layers(model)) == set(names)
