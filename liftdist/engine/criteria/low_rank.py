"""The principal weights of LIFT: the entries that are largest after low-rank approximation.

W_r  = best rank-r approximation of W [m, n], from liftdist/engine/factors.py
S    = the k entries of largest |W_r|, ties to the lowest flat index            (arXiv 2506.00772, section 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.factors import FACTORINGS, KRYLOV_BLOCK, factor, max_krylov_blocks
from liftdist.engine.scores import Scored, Scores, choosing


@dataclass(frozen=True)
class LowRank(Scored):
    """The criterion with its settings: all that its result depends on besides the matrix and the seed.

    Args:
        filter_rank: ``r``; at ``r >= min(m, n)`` the matrix itself is scored.
        method: how ``W_r`` is computed: ``"exact"``, by a full SVD, or ``"fast"``, see :mod:`liftdist.engine.factors`. The
            seed is that of the random start of its Krylov space.
    """

    filter_rank: int = 64
    method: str = "fast"

    are_magnitudes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.filter_rank < 1:
            raise ValueError(f"filter_rank must be at least 1, got {self.filter_rank}")
        if self.method not in FACTORINGS:
            raise ValueError(f"method must be one of {', '.join(FACTORINGS)}, got {self.method!r}")

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        approximation = self.approximation(weight, num_selected, seed)
        return lambda rows: approximation(rows).abs_()

    def approximation(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        """A slice of the rows of ``W_r``, as a new tensor. Holds ``weight`` only if it is ``W_r``, so that it can be freed."""
        if self.filter_rank >= min(weight.shape):
            return lambda rows: weight[rows].clone()
        left, right, _ = factor(weight, num_selected, self.filter_rank, self.method, seed)
        return lambda rows: left[rows] @ right.T

    def cost(self, m: int, n: int) -> float:
        """Relative time to factor an ``[m, n]`` matrix."""
        return cost(m, n, self.filter_rank, self.method)

    def workspace(self, m: int, n: int, num_selected: int) -> int:
        """Bytes needed besides an ``[m, n]`` weight."""
        return workspace(m, n, num_selected, self.filter_rank, self.method)


def make(settings: Any) -> LowRank:
    """From the settings ``filter_rank`` and ``method``."""
    return LowRank(settings.filter_rank, settings.method)


def select(weight: Tensor, num_selected: int, filter_rank: int, method: str = "fast", seed: int = 0) -> Tensor:
    """Flat indices of the ``num_selected`` entries of largest ``|W_r|``, see :class:`LowRank` and its call."""
    return LowRank(filter_rank, method)(weight, num_selected, seed)


def cost(m: int, n: int, filter_rank: int, method: str) -> float:
    """Relative time to factor an ``[m, n]`` matrix, for assigning matrices to ranks. Unit: about one flop."""
    small, large = min(m, n), max(m, n)
    if method == "exact":
        return 6.0 * large * small**2 + 20.0 * small**3
    if max_krylov_blocks(small, filter_rank):
        basis = 7 * filter_rank
        return 4.0 * m * n * (basis + filter_rank) + 4.0 * small * basis**2
    return 2.0 * large * small**2 + 10.0 * small**3


def workspace(m: int, n: int, num_selected: int, filter_rank: int, method: str) -> int:
    """Bytes that :func:`select` needs besides an ``[m, n]`` weight, excluding internal workspace of LAPACK and cuSOLVER."""
    small, size = min(m, n), m * n
    if method == "exact":
        factoring = 4 * (2 * size + small * (m + n + small))  # a copy that is overwritten; U, V
    else:
        krylov = 4 * max_krylov_blocks(small, filter_rank) * KRYLOV_BLOCK * (m + n + 2 * small)
        factoring = 4 * size + max(krylov, 8 * (size + 3 * small * small))  # float64 is the last resort
    return max(factoring, choosing(m, n, num_selected))
