"""The states that an optimizer keeps of the flat vector: scalars, and tensors of its shape, which may be quantised."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def of_elements(optimizer: torch.optim.Optimizer | None, values: Tensor) -> list[tuple[dict[str, Any], str]]:
    """``(state, key)`` of each tensor of optimizer state with one element per principal weight.

    Raises:
        ValueError: a state is neither a scalar nor of the shape of ``values``.
    """
    state = optimizer.state.get(values, {}) if optimizer is not None else {}
    found = []
    for key, value in state.items():
        if _is_scalar(value):
            continue
        if value.shape != values.shape:
            raise ValueError(
                f"optimizer state {key!r} has shape {tuple(value.shape)}; a refresh can carry over scalars and "
                f"tensors of shape {tuple(values.shape)}"
            )
        found.append((state, key))
    return found


def scalars(optimizer: torch.optim.Optimizer, values: Tensor) -> dict[str, float]:
    """The scalar states, by name."""
    return {key: float(value) for key, value in optimizer.state.get(values, {}).items() if _is_scalar(value)}


def dense(state: Tensor) -> Tensor:
    """An optimizer state, dequantised to float32 if it is quantised."""
    return state.dequantize() if is_traceable_wrapper_subclass(state) else state


def in_own_format(optimizer: torch.optim.Optimizer | None, key: str, values: Tensor, state: Tensor) -> Tensor:
    """``state`` in the optimizer's own format: torchao's optimizers quantise it, ``exp_avg`` as signed."""
    make = getattr(optimizer, "_new_buffer", None)
    return make(values, key == "exp_avg").copy_(state) if make is not None else state


def gathered(
    optimizer: torch.optim.Optimizer | None, values: Tensor, mean: Tensor, square: Tensor, number: int
) -> dict[str, Tensor]:
    """Adam's states that, corrected, are the mean of ``number`` gradients and that of their squares; none of other optimizers.

    Args:
        mean: ``[k_local]``, as ``square``, the mean of squares.
    """
    state = optimizer.state.get(values, {}) if optimizer is not None else {}
    if optimizer is None or not {"exp_avg", "exp_avg_sq"} <= set(state):
        return {}
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    steps = number if "age" in state else float(state["step"])
    return {
        "exp_avg": mean * -math.expm1(steps * math.log(beta1)) if beta1 else mean,
        "exp_avg_sq": square * -math.expm1(steps * math.log(beta2)) if beta2 else square,
        "age": torch.full_like(mean, number),
    }


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0
