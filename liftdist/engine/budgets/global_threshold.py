"""One threshold for the scores of all matrices: where they are large, more weights are trained.

K   = sum over matrices of the number that `per_matrix` gives them
s   = score / root mean square of the scores of its matrix, of a criterion whose scores are magnitudes
k_j = number of entries of matrix j among the K of largest s

Between matrices s is compared to eight significant bits (as bfloat16 has); what is left over of the bucket with the threshold
is divided among them in proportion to their entries in it. Within a matrix scores are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from liftdist.engine.budgets.per_matrix import PerMatrix


@dataclass(frozen=True)
class GlobalThreshold(PerMatrix):
    """The sum of :class:`PerMatrix`, divided by the scores."""

    compares: ClassVar[bool] = True


def make(settings: Any) -> GlobalThreshold:
    """From the settings ``density`` and ``budget_rank``."""
    return GlobalThreshold(settings.density, settings.budget_rank)
