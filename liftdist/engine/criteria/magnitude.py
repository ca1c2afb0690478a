"""The entries of largest absolute value: plain magnitude.

S = the k entries of largest |W|                    (a baseline of arXiv 2506.00772; PEFT has it as a sparse tuner)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.scores import Scored, Scores


@dataclass(frozen=True)
class Magnitude(Scored):
    """Depends on nothing but the matrix."""

    are_magnitudes: ClassVar[bool] = True

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        return lambda rows: weight[rows].abs()


def make(settings: Any) -> Magnitude:
    return Magnitude()
