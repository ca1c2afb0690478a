"""All entries below a threshold: small weights, which matter least to the model.

S = the entries with |w| < t                         (SaRA, arXiv 2409.06633)

Their number follows from the weights. At a refresh the rule is applied again: those that have grown past t are kept as they are,
and the rest goes on. SaRA does that once, half-way (its progressive adjustment): set `selection.refresh_interval` to more than
half of the steps; half of them would refresh before the last one, too. Its loss, which keeps the update of low rank, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """
    Args:
        threshold: ``t``.
    """

    threshold: float
    decides_number: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """In place of a budget: nothing is known before the weights are."""
        return dict.fromkeys(shapes, 0)

    def __call__(self, weight: Tensor, num_selected: int, seed: int) -> Tensor:
        return (weight.float().abs() < self.threshold).flatten().nonzero().squeeze(1)


def make(settings: Any) -> Threshold:
    """From the setting ``threshold``."""
    return Threshold(settings.threshold)
