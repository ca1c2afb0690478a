"""Adapters of linear modules, by the library peft.

    X.weight [m, n]  ->  X.base_layer.weight [m, n]                     frozen
                         X.lora_A.default.weight [r, n]                 trained
                         X.lora_B.default.weight [m, r]                 trained
                         X.lora_magnitude_vector.default.weight [m]     trained, of DoRA alone
        MiSS             X.miss_block.default [r, m]                    trained; bat [m / r, r, r], mini [r, mini_r]
        AdaLoRA          X.lora_A.default [r, n], lora_B.default [m, r], lora_E.default [r, 1]      trained
        SHiRA            X.shira_weight.default [r (m + n)]             trained; their places, [2, r (m + n)], are the same
                                                                        for all matrices of a shape

    y = W x + s B A x,    s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)
    DoRA (2402.09353)     y = diag(magnitude / |W + s B A|) (W + s B A) x, the norm that of each row
    PiSSA (2404.02948)    s B_0 A_0 = the r largest singular values and vectors of W, and W is what they leave
    AdaLoRA (2303.10512)  y = W x + alpha / (r + 1e-5) B diag(E) A x
    EVA (2410.07170)      A_0 = the main directions of a module's inputs, see :mod:`liftdist.methods.eva`; s B A as LoRA's
    MiSS (2409.15371)     y = W x + D^T S x, where S sums the entries of x that are r apart; mini: D repeats mini_r columns;
                          bat: y = (W + W' D + D) x, in blocks [r, r], where W' is W
    SHiRA (2406.13175)    y = (W + V) x, where V holds r (m + n) trained values at random places

The modules, their forward, their initial values and how they are merged are peft's. A ``Conv1D`` of transformers holds ``W``
transposed; for MiSS and SHiRA peft has no such modules.
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


def peft_config(settings: LoraConfig, target_modules: Sequence[str], is_empty: bool = False, **others: Any) -> Any:
    """The config of peft. Raises ``UserError`` if the library is absent.

    Args:
        is_empty: adapters get no initial values.
        others: further fields. SHiRA's places are drawn if ``random_seed`` is among them.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(NEEDS_PEFT)
    import peft

    of_rank = {"r": settings.places} if settings.variant != "adalora" else {}
    given = of_rank | {"target_modules": list(target_modules)} | others
    if settings.variant == "miss":
        how = {"init_weights": settings.miss_init or True, "mini_r": settings.mini_r or 1}
        return peft.MissConfig(miss_dropout=settings.dropout, **(how | given))
    if settings.variant == "shira":
        config = peft.ShiraConfig(**given)
        if "random_seed" not in others:
            config.mask_fn = None
        return config
    if settings.variant == "adalora":
        own = dataclasses.asdict(settings.adalora) | {"target_r": settings.final_rank}
        own["deltaT"] = own.pop("delta_t")
        return peft.AdaLoraConfig(
            init_r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            total_step=own["tinit"] + own["tfinal"] + 1,  # until it is known
            init_lora_weights=not is_empty,
            **own,
            **given,
        )
    scaled = settings.alpha * settings.places / settings.rank  # ranks that EVA moves do not change the scale
    niter = "" if settings.pissa_niter is None else f"_niter_{settings.pissa_niter}"
    initial = f"pissa{niter}" if settings.variant == "pissa" else True
    return peft.LoraConfig(
        lora_alpha=scaled if settings.variant == "eva" else settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.variant == "dora",
        use_rslora=settings.variant == "rslora",
        init_lora_weights=False if is_empty else initial,
        **given,
    )


def misfit(settings: LoraConfig, rows: int, columns: int) -> str | None:
    """Why a matrix cannot have an adapter: a setting with what it must be "of" it, or None."""
    rank, of_rank = settings.rank, f"lora.rank={settings.rank}: must"
    if settings.variant == "pissa" and rank > min(rows, columns):
        return f"{of_rank} be at most the sides of"
    if settings.variant == "shira" and rank * (rows + columns) > rows * columns:
        return f"{of_rank} be at most m n / (m + n) of"
    if settings.variant == "miss" and rank > columns:
        return f"{of_rank} be at most the columns of"
    if settings.variant == "eva" and settings.places > columns:
        return f"lora.rank={rank} with lora.eva.rho={settings.eva.rho:g}: must give at most as many ranks as the columns of"
    if settings.miss_init == "bat" and (rows % rank or columns % rank):
        return f"{of_rank} divide the sides of"
    if settings.mini_r is not None and rows % settings.mini_r:
        return f"lora.mini_r={settings.mini_r}: must divide the rows of"
    return None


def inject(model: PreTrainedModel, settings: LoraConfig, patterns: Sequence[str]) -> None:
    """Add adapters to the linear modules that fit ``patterns``, on the meta device, and freeze all else.

    Raises:
        UserError: peft is absent, or has no adapters for a module; and like :func:`linear_modules`.
    """
    modules = linear_modules(model, patterns)
    for name in modules:
        shape = model.get_submodule(name).weight.shape
        if why := misfit(settings, *shape):
            raise UserError(f"{why} {name}, {list(shape)}, with {settings.miss_init or settings.variant}")
    config = peft_config(settings, targets(modules, model), is_empty=True)
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # which it then sets itself
            inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora.modules: {str(error).splitlines()[0]}") from None
    if different := set(modules) - set(layers(model)) or set(layers(model)) - set(modules):
        raise UserError(
            f"lora.modules: peft has no adapters for {min(different)} of a {type(model).__name__}; leave it out"
        )
    for layer in layers(model).values():
        _without_ranknum(layer)


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
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


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
    before, _, after = name.rpartition(f".{ADAPTER}")
    return before if before.endswith("lora_magnitude_vector") else before + after


def is_transposed(layer: Any) -> bool:
    """Whether a layer holds its matrix transposed."""
    return getattr(layer, "fan_in_fan_out", False)


def matrix(layer: Any, weight: Tensor) -> Tensor:
    """``[m, n]``, the matrix that a layer multiplies by: a view of its weight, or of one like it."""
    return weight.T if is_transposed(layer) else weight


def drawn(settings: LoraConfig, rows: int, columns: int, seed: int) -> Tensor:
    """``[2, r (rows + columns)]`` int32: row and column of SHiRA's values in a matrix, as peft draws them for a seed."""
    return alone(settings, torch.empty(rows, columns), "", random_seed=seed).shira_indices[ADAPTER]


def alone(settings: LoraConfig, weight: Tensor, seed: str, **others: Any) -> Any:
    """A layer of peft on ``weight [m, n]`` float32, which PiSSA changes, with the initial values that peft gives adapters.

    Args:
        seed: seeds what is random among them.
        others: further fields of peft's config.
    """
    from peft import inject_adapter_in_model

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.ModuleDict({"linear": linear})
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big", signed=True)
    with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(number)
        inject_adapter_in_model(peft_config(settings, ["linear"], **others), model, ADAPTER)
    _without_ranknum(model["linear"])
    return model["linear"]


def _without_ranknum(layer: Any) -> None:
    """Let AdaLoRA's initial rank, of which peft makes a frozen parameter, be a number: it is in no file, and never changes."""
    if hasattr(layer, "ranknum"):
        del layer.ranknum
        layer.ranknum = {ADAPTER: float(layer.r[ADAPTER])}


@torch.no_grad()
def merged(settings: LoraConfig, weight: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """``[m, n]`` float32: a weight ``[m, n]`` with an adapter merged into it, by peft.

    Args:
        values: of the adapter's parameters, as :func:`exported` names them, without the name of the module; and
            ``shira_indices``.
    """
    layer = alone(settings, weight.to(torch.float32, copy=True), "")
    for name, param in layer.named_parameters():
        if name != "base_layer.weight":
            param.copy_(values[exported(name)])
    if settings.variant == "shira":
        layer.shira_indices[ADAPTER] = values["shira_indices"]
    layer.merge()
    return layer.base_layer.weight.detach()
