"""The entries to which the loss is most sensitive, smoothed over batches and weighed by how much that varies.

I   = |w g|, the change of the loss, to first order, if w were zero                (AdaLoRA, arXiv 2303.10512, eq. 8)
I_  <- b I_ + (1 - b) I,   U_ <- b U_ + (1 - b) |I - I_|,   after each batch        (eq. 9 and 10, b = 0.85)
s   = I_ U_, S = the k entries of largest s                                       (eq. 11)

AdaLoRA averages over the steps of training; here the averages begin anew at each selection and do not outlast it; its
batches are the same each time, the run's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.gathered import Gathered

BETA = 0.85


@dataclass(frozen=True)
class Sensitivity(Gathered):
    """The product of two moving averages."""

    states: ClassVar[int] = 2

    def add(self, states: Sequence[Tensor], gradient: Tensor, weight: Tensor) -> None:
        mean, spread = states
        sensitivity = (weight * gradient).abs_()
        mean.lerp_(sensitivity, 1 - BETA)
        spread.lerp_(sensitivity.sub_(mean).abs_(), 1 - BETA)

    def statistic(self, states: Sequence[Tensor]) -> Tensor:
        mean, spread = states
        return mean.mul_(spread)


def make(settings: Any) -> Sensitivity:
    """From the setting ``gradient_batches``."""
    return Sensitivity(settings.gradient_batches or Sensitivity.batches)
