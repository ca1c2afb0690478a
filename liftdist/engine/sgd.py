"""SGD with momentum on the principal weights: a state of 4 B an entry.

b = mu b + g        x = x - lr b        an entry that a refresh selects has b = 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liftdist.engine.decay import Decay
from liftdist.engine.principal import PrincipalWeights


class PrincipalSGD(torch.optim.SGD):
    """``torch.optim.SGD`` on ``principal.values`` whose ``step()`` includes ``principal.write_back()``; decoupled weight decay.

    Args:
        decay_to_base: let weight decay pull towards :attr:`PrincipalWeights.base_values` instead of zero.
    """

    def __init__(
        self,
        principal: PrincipalWeights,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay_to_base: bool = False,
    ) -> None:
        super().__init__([principal.values], lr=lr, momentum=momentum)
        self.principal = principal
        self._decay = Decay(principal, weight_decay, decay_to_base)

    @property
    def element_states(self) -> set[str]:
        """Names of the states with one element per principal weight."""
        return {"momentum_buffer"} if self.param_groups[0]["momentum"] else set()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the values, write them into the model, rounded, and clear the gradient. Returns the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values, gradient = self.principal.values, self.principal.values.grad
        if gradient is not None:
            self._decay.step(self.param_groups[0]["lr"])
        values.grad = gradient.to(values.dtype) if gradient is not None else None
        super().step()
        values.grad = gradient  # float32, to accumulate the next one
        self.principal.write_back()
        return loss


def make(principal: PrincipalWeights, settings: Any) -> PrincipalSGD:
    """From the settings ``lr``, ``momentum``, ``weight_decay`` and ``decay_towards``."""
    momentum = 0.9 if settings.momentum is None else settings.momentum
    to_base = settings.decay_towards == "base"
    return PrincipalSGD(principal, settings.lr, momentum, settings.weight_decay, to_base)
