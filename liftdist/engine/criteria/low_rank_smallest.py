"""The entries that are smallest after low-rank approximation: an ablation.

S = the k entries of smallest |W_r|                 (what the LIFT authors' published code selects under one of its names)
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.scores import Scores, inverted


class LowRankSmallest(LowRank):
    """:class:`LowRank` in the opposite order."""

    are_magnitudes: ClassVar[bool] = False

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        approximation = self.approximation(weight, num_selected, seed)
        return lambda rows: inverted(approximation(rows))


def make(settings: Any) -> LowRankSmallest:
    """From the settings ``filter_rank`` and ``method``."""
    return LowRankSmallest(settings.filter_rank, settings.method)
