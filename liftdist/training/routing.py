"""How evenly the routers of a model spread tokens over its experts, as metrics of training."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

ASSIGNED = "top_k_index"  # the argument of a module of experts that says which of them each token goes to, [tokens, k]


class Routing:
    """Counts the tokens that each expert gets in training, padding included; nothing if the model names no assignment.

    Where the model's config asks for the routers' auxiliary loss it is measured, too: that of Switch Transformers (arXiv
    2101.03961, equations 4 to 6) over all tokens and layers since the last figures, as transformers computes it for a batch.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.is_counting = True  # False while another run has the model
        layers = [module for module in model.modules() if _experts_of(module)]
        most = max(map(_experts_of, layers), default=0)
        self._experts = torch.tensor([_experts_of(module) for module in layers], device=device)  # [layers]
        #: ``[layers, most + 1]``: the last counts what went to no expert
        self._counts = torch.zeros(len(layers), most + 1, dtype=torch.int64, device=device)
        for number, module in enumerate(layers):
            module.register_forward_pre_hook(_counting(self, number), with_kwargs=True)
        routers = dict(_routers(model)) if wants_auxiliary_loss(model) else {}
        #: ``[3, experts]`` float64: choices of each expert, its summed probability, and rows, over all layers
        self._switch = torch.zeros(3, most, dtype=torch.float64, device=device) if routers and most else None
        for module, index in routers.items() if self._switch is not None else ():
            module.register_forward_hook(_weighing(self, index, _text(model).num_experts_per_tok))

    def count(self, layer: int, assigned: Tensor) -> None:
        _tally(self._counts[layer], assigned)

    def weigh(self, logits: Tensor, chosen: int) -> None:
        """Add the router logits ``[tokens, experts]`` of a layer, of which each token goes to ``chosen``."""
        assert self._switch is not None
        if logits.shape[-1] != self._switch.shape[1]:
            return  # not of these experts
        logits = logits.detach().float().flatten(0, -2)
        probabilities = logits.softmax(-1).sum(0)
        choices = _tally(torch.zeros_like(probabilities, dtype=torch.int64), logits.topk(chosen).indices)
        self._switch += torch.stack([choices, probabilities, torch.full_like(probabilities, len(logits))]).double()

    def figures(self) -> dict[str, float]:
        """Metrics by tag since the last call: the busiest expert of a layer, in multiples of a mean one, the share of experts
        that no token reached, and the auxiliary loss if it is measured. Collective."""
        if not len(self._experts):
            return {}
        counts = _taken(self._counts)[:, :-1]
        means = counts.sum(1) / self._experts
        busiest = (counts.amax(1) / means.clamp_min(1e-9)).max()
        unused = self._experts - (counts > 0).sum(1)
        figures = {"experts/busiest": float(busiest), "experts/unused": float(unused.sum() / self._experts.sum())}
        if self._switch is not None:
            choices, probabilities, rows = _taken(self._switch)
            if rows.all():
                figures["experts/auxiliary_loss"] = float(len(rows) * (choices * probabilities / rows**2).sum())
        return figures


def wants_auxiliary_loss(model: nn.Module) -> bool:
    """Whether the config of a model asks for its routers' auxiliary loss, and the model has one."""
    if not isinstance(model, PreTrainedModel):
        return False
    text = _text(model)
    return bool(getattr(text, "output_router_logits", False) and getattr(text, "num_experts_per_tok", None))


def _text(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _tally(counts: Tensor, numbers: Tensor) -> Tensor:
    """Add to ``counts [n]`` int64 how often each of 0 to n - 1 is among ``numbers``, those above counted as the last. The host
    waits for no GPU, as it does in ``bincount``."""
    numbers = numbers.flatten().clamp_max(len(counts) - 1)
    return counts.index_add_(0, numbers, counts.new_ones(numbers.shape))


def _taken(sums: Tensor) -> Tensor:
    """The sums over all ranks, which begin again from zero."""
    taken = sums.clone()
    sums.zero_()
    if dist.is_initialized():
        dist.all_reduce(taken)
    return taken


def _experts_of(module: nn.Module) -> int:
    """The number of experts that a module holds and assigns tokens to; 0 for another module."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return 0
    return down.shape[0] if ASSIGNED in inspect.signature(type(module).forward).parameters else 0


def _routers(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose output holds router logits, and at which index, by what transformers records of a model."""
    for part in model.modules():
        recorded = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits") or ()
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            for module in part.modules():
                if recorder.target_class and isinstance(module, recorder.target_class):
                    yield module, recorder.index


def _counting(routing: Routing, layer: int) -> Callable[..., None]:
    """Holds ``routing`` weakly: the model must not keep it alive."""
    reference = weakref.ref(routing)
    names = None

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal names
        alive = reference()
        if alive is None or not alive.is_counting or not module.training:
            return
        if names is None:
            names = [*inspect.signature(type(module).forward).parameters][1:]
        assigned = kwargs[ASSIGNED] if ASSIGNED in kwargs else args[names.index(ASSIGNED)]
        alive.count(layer, assigned.detach())

    return hook


def _weighing(routing: Routing, index: int, chosen: int) -> Callable[..., None]:
    """The same for the output of a router."""
    reference = weakref.ref(routing)

    def hook(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        alive = reference()
        if alive is not None and alive.is_counting and module.training:
            alive.weigh(output[index], chosen)

    return hook
