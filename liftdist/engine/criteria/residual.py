"""The entries that low-rank approximation leaves over.

S = the k entries of largest |W - W_r|               (DSEE, arXiv 2111.00160, which decomposes W into low rank and sparse parts)

DSEE finds both parts together by iteration (GreBsmo); here W_r is the best approximation of W alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.scores import Scores, choosing


class Residual(LowRank):
    """:class:`LowRank` of what is left over."""

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        approximation = self.approximation(weight, num_selected, seed)
        return lambda rows: (weight[rows] - approximation(rows)).abs_()

    def workspace(self, m: int, n: int, num_selected: int) -> int:
        return max(super().workspace(m, n, num_selected), 8 * m * n + choosing(m, n, num_selected))


def make(settings: Any) -> Residual:
    """From the settings ``filter_rank`` and ``method``."""
    return Residual(settings.filter_rank, settings.method)
