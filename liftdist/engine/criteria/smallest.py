"""The entries of smallest absolute value: an ablation.

S = the k entries of smallest |W|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liftdist.engine.scores import Scored, Scores, inverted


@dataclass(frozen=True)
class Smallest(Scored):
    """Depends on nothing but the matrix."""

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        return lambda rows: inverted(weight[rows])


def make(settings: Any) -> Smallest:
    return Smallest()
