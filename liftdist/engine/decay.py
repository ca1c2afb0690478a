"""Decoupled weight decay (arXiv 1711.05101), towards zero or towards the base model.

x = x - lr d (x - x_0)        x_0 = 0, or the value of the entry in the base model (L2-SP, arXiv 1802.01483, decoupled)
"""

from __future__ import annotations

import torch

from liftdist.engine.principal import PrincipalWeights


class Decay:
    """
    Args:
        rate: ``d``.
        to_base: towards :attr:`PrincipalWeights.base_values`; raises ``ValueError`` if they are not kept.
    """

    def __init__(self, principal: PrincipalWeights, rate: float, to_base: bool) -> None:
        self.principal, self.rate, self.to_base = principal, rate, to_base
        if to_base:
            _ = principal.base_values

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Decay the values; before the optimizer's step."""
        values = self.principal.values.detach()
        if self.rate and self.to_base:
            values.lerp_(self.principal.base_values.to(values.dtype), lr * self.rate)
        elif self.rate:
            values.mul_(1 - lr * self.rate)
