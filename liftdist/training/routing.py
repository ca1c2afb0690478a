"""How evenly the routers of a model spread tokens over its experts, as metrics of training."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ASSIGNED = "top_k_index"  # the argument of a module of experts that says which of them each token goes to, [tokens, k]


class Routing:
    """Counts the tokens that each expert gets in training, padding included; nothing if the model names no assignment."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        layers = [module for module in model.modules() if _experts_of(module)]
        most = max(map(_experts_of, layers), default=0)
        self._experts = torch.tensor([_experts_of(module) for module in layers], device=device)  # [layers]
        self._counts = torch.zeros(len(layers), most, dtype=torch.int64, device=device)
        for number, module in enumerate(layers):
            module.register_forward_pre_hook(_hook(self, number), with_kwargs=True)

    def count(self, layer: int, assigned: Tensor) -> None:
        self._counts[layer] += torch.bincount(assigned.flatten(), minlength=self._counts.shape[1])[
            : self._counts.shape[1]
        ]

    def figures(self) -> dict[str, float]:
        """Metrics by tag since the last call: the busiest expert of a layer, in multiples of a mean one, and the share of experts
        that no token reached. Collective."""
        if not len(self._experts):
            return {}
        counts = self._counts.clone()
        self._counts.zero_()
        if dist.is_initialized():
            dist.all_reduce(counts)
        means = counts.sum(1) / self._experts
        busiest = (counts.amax(1) / means.clamp_min(1e-9)).max()
        unused = self._experts - (counts > 0).sum(1)
        return {"experts/busiest": float(busiest), "experts/unused": float(unused.sum() / self._experts.sum())}


def _experts_of(module: nn.Module) -> int:
    """The number of experts that a module holds and assigns tokens to; 0 for another module."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return 0
    return down.shape[0] if ASSIGNED in inspect.signature(type(module).forward).parameters else 0


def _hook(routing: Routing, layer: int) -> Any:
    """Holds ``routing`` weakly: the model must not keep it alive."""
    reference = weakref.ref(routing)
    names = None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal names
        alive = reference()
        if alive is None or not module.training:
            return
        if names is None:
            names = [*inspect.signature(type(module).forward).parameters][1:]
        assigned = kwargs[ASSIGNED] if ASSIGNED in kwargs else args[names.index(ASSIGNED)]
        alive.count(layer, assigned.detach())

    return hook
