"""SGD with momentum on the principal weights: a state of 4 B an entry, or of 2 B with values in bf16.

b = mu b + g        x = x - lr d (x - x_0) - lr b        an entry that a refresh selects has b = 0

That is ``torch.optim.SGD`` without dampening, with decoupled weight decay ``d`` towards ``x_0``. Values and momentum in bf16 are
computed in float32 and rounded once; the gradient is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liftdist.engine.elementwise import decay_target, in_float32
from liftdist.engine.principal import PrincipalWeights


class PrincipalSGD(torch.optim.Optimizer):
    """SGD on ``principal.values`` whose ``step()`` includes ``principal.write_back()``.

    Args:
        decay_to_base: let weight decay pull towards :attr:`PrincipalWeights.base_values` instead of zero.

    Raises:
        ValueError: ``decay_to_base`` without base values.
    """

    def __init__(
        self,
        principal: PrincipalWeights,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay_to_base: bool = False,
    ) -> None:
        super().__init__([principal.values], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.principal, self.decay_to_base = principal, decay_to_base
        decay_target(principal, decay_to_base)  # raises

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the values, write them into the model, rounded, and clear the gradient. Returns the result of ``closure``."""
        self.principal.check_not_at_base()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values, gradient = self.principal.values.detach(), self.principal.values.grad
        if gradient is not None:
            lr, momentum, decay = (self.param_groups[0][key] for key in ("lr", "momentum", "weight_decay"))
            state, target = self.state[self.principal.values], decay_target(self.principal, self.decay_to_base)
            if momentum and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(values)
            buffer = state["momentum_buffer"] if momentum else gradient
            for x, g, b, x0 in in_float32(values, gradient, buffer, target):
                if momentum:
                    b.mul_(momentum).add_(g)
                x.lerp_(x0, lr * decay).sub_(b, alpha=lr)
        self.principal.write_back()
        return loss


def element_states(settings: Any) -> set[str]:
    """Names of the optimizer's states with one element for each value, in its dtype."""
    return set() if settings.momentum == 0 else {"momentum_buffer"}


def make(principal: PrincipalWeights, settings: Any) -> PrincipalSGD:
    """From the settings ``lr``, ``momentum``, ``weight_decay`` and ``decay_towards``."""
    momentum = 0.9 if settings.momentum is None else settings.momentum
    to_base = settings.decay_towards == "base"
    return PrincipalSGD(principal, settings.lr, momentum, settings.weight_decay, to_base)
