"""LoRA adapters of linear modules, by the library peft.

    X.weight [m, n]  ->  X.base_layer.weight [m, n]                     frozen
                         X.lora_A.default.weight [r, n]                 trained
                         X.lora_B.default.weight [m, r]                 trained
                         X.lora_magnitude_vector.default.weight [m]     trained, of DoRA alone

    y = W x + s B A x,    s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)
    DoRA (2402.09353)     y = diag(magnitude / |W + s B A|) (W + s B A) x, the norm that of each row
    PiSSA (2404.02948)    s B_0 A_0 = the r largest singular values and vectors of W, and W is what they leave

The modules, their forward, their initial values and how they are merged are peft's. A ``Conv1D`` of transformers holds ``W``
transposed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.method_settings import NEEDS_PEFT, LoraConfig
from liftdist.models.names import NameMap

ADAPTER = "default"  # peft's name of an adapter that is given none


def enable(layers: Iterable[Any], is_on: bool) -> None:
    """Let layers of peft compute with their adapters, or as those of the base model."""
    for layer in layers:
        layer._disable_adapters = not is_on  # peft's enable_adapters would freeze them, too


def linear_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the linear modules to adapt: those that fit ``patterns``, without experts whose matrices share a parameter.

    Raises:
        UserError: none is left, or one shares its weight with another module.
    """
    places = principal_matrices(model, patterns)
    found = [name.removesuffix(".weight") for name, place in places.items() if name == place.parameter]
    if not found:
        raise UserError(
            f"lora.modules: {next(iter(places))} is a part of {next(iter(places.values())).parameter}, as matrices of experts "
            f"are: it cannot have an adapter; choose other modules"
        )
    owners = Counter(param for _, param in model.named_parameters(remove_duplicate=False))
    for name in found:
        if owners[model.get_submodule(name).weight] > 1:  # type: ignore[index]
            raise UserError(f"lora.modules: {name} shares its weight with another module; leave it out")
    return found


def targets(modules: Sequence[str], model: nn.Module) -> list[str]:
    """peft's ``target_modules`` that are these modules of ``model`` and no others: the ends of their names, or all of them.

    Raises:
        UserError: a module cannot be told by its name from another that ends with it.
    """
    every = [name for name, _ in model.named_modules()]
    for names in (sorted({name.rpartition(".")[2] for name in modules}), list(modules)):
        ends = tuple(f".{name}" for name in names)
        if {name for name in every if name in names or name.endswith(ends)} == set(modules):
            return names
    raise UserError(
        "lora.modules: another module's name ends with that of one that fits; choose modules of either alone"
    )


def peft_config(settings: LoraConfig, target_modules: Sequence[str], **others: Any) -> Any:
    """The ``LoraConfig`` of peft. Raises ``UserError`` if the library is absent."""
    if importlib.util.find_spec("peft") is None:
        raise UserError(NEEDS_PEFT)
    import peft

    niter = "" if settings.pissa_niter is None else f"_niter_{settings.pissa_niter}"
    given = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_dora": settings.variant == "dora",
        "use_rslora": settings.variant == "rslora",
        "init_lora_weights": f"pissa{niter}" if settings.variant == "pissa" else True,
        "target_modules": list(target_modules),
    }
    return peft.LoraConfig(**(given | others))


def inject(model: PreTrainedModel, settings: LoraConfig, patterns: Sequence[str]) -> None:
    """Add adapters to the linear modules that fit ``patterns``, on the meta device, and freeze all else.

    Raises:
        UserError: peft is absent, or has no adapters for a module; and like :func:`linear_modules`.
    """
    modules = linear_modules(model, patterns)
    for name in modules if settings.variant == "pissa" else ():
        if settings.rank > min(shape := model.get_submodule(name).weight.shape):
            raise UserError(
                f"lora.rank={settings.rank}: must be at most the sides of {name}, {list(shape)}, with pissa"
            )
    config = peft_config(settings, targets(modules, model), init_lora_weights=False)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # which it then sets itself
            inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"lora.modules: {str(error).splitlines()[0]}") from None
    if different := set(modules) - set(layers(model)) or set(layers(model)) - set(modules):
        raise UserError(
            f"lora.modules: peft has no adapters for {min(different)} of a {type(model).__name__}; leave it out"
        )


def renamed(names: NameMap, model: nn.Module) -> NameMap:
    """The names of the tensors of a model that has got adapters, which are in no file, from those that it had before."""
    moved = {
        f"{module}.{leaf}": f"{module}.base_layer.{leaf}"
        for module, layer in layers(model).items()
        for leaf, _ in layer.base_layer.named_parameters(recurse=False)
    }
    pieces = {moved.get(name, name): found for name, found in names.pieces.items()}
    stored = {moved.get(name, name): found for name, found in names.stored.items()}
    return dataclasses.replace(names, pieces=pieces | dict.fromkeys(parameters(model), ()), stored=stored)


def layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers with adapters, by the name of the module that they took the place of."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters, by name."""
    return {
        f"{name}.{key}": param
        for name, layer in layers(model).items()
        for key, param in layer.named_parameters()
        if not key.startswith("base_layer.")
    }


def exported(name: str) -> str:
    """What peft calls a parameter in a file: without the name of the adapter."""
    name = name.removesuffix(f".{ADAPTER}.weight")
    return name if name.endswith("lora_magnitude_vector") else f"{name}.weight"


def matrix(layer: Any, weight: Tensor) -> Tensor:
    """``[m, n]``, the matrix that a layer multiplies by: a view of its weight, or of one like it."""
    return weight.T if layer.fan_in_fan_out else weight


def alone(settings: LoraConfig, weight: Tensor, seed: str) -> Any:
    """A layer of peft on ``weight [m, n]`` float32, which PiSSA changes, with the initial values that peft gives adapters.

    Args:
        seed: seeds what is random among them.
    """
    from peft import inject_adapter_in_model

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.ModuleDict({"linear": linear})
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big", signed=True)
    with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(number)
        inject_adapter_in_model(peft_config(settings, ["linear"]), model, ADAPTER)
    return model["linear"]


@torch.no_grad()
def merged(settings: LoraConfig, weight: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """``[m, n]`` float32: a weight ``[m, n]`` with an adapter merged into it, by peft.

    Args:
        values: of the adapter's parameters, as :func:`exported` names them, without the name of the module.
    """
    layer = alone(settings, weight.to(torch.float32, copy=True), "")
    for name, param in layer.named_parameters():
        if name != "base_layer.weight":
            param.copy_(values[exported(name)])
    layer.merge()
    return layer.base_layer.weight.detach()
