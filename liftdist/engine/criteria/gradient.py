"""The entries of largest squared gradient, summed over batches.

s = sum over batches b of g_b^2, S = the k entries of largest s       (SPT, arXiv 2303.08566, eq. 4, with 8 batches)

SPT takes the largest of the whole model, as they are. ``selection.budget=global_threshold`` compares them after a division by the
root mean square of each matrix. That SPT trains matrices with many such entries by low-rank adapters instead, is left out. It
selects once; a refresh here gathers anew, over the same batches: the run's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liftdist.engine.gathered import Gathered


@dataclass(frozen=True)
class Gradient(Gathered):
    """Sum of squares."""

    def add(self, states: Sequence[Tensor], gradient: Tensor, weight: Tensor) -> None:
        states[0].addcmul_(gradient, gradient)


def make(settings: Any) -> Gradient:
    """From the setting ``gradient_batches``."""
    return Gradient(settings.gradient_batches or Gradient.batches)
