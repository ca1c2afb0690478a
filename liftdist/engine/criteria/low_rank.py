"""The principal weights of LIFT: the entries that are largest after low-rank approximation.

W_r  = best rank-r approximation of W [m, n], from liftdist/engine/factors.py
S    = the k entries of largest |W_r|, ties to the lowest flat index            (arXiv 2506.00772, section 3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftdist.engine.factors import FACTORINGS, KRYLOV_BLOCK, factor, max_krylov_blocks
from liftdist.engine.topk import BLOCK, CANDIDATE_MARGIN, top_k

FACTORING_THREADS = 1  # fixed: another number of threads rounds differently and changes a few entries


@dataclass(frozen=True)
class LowRank:
    """The criterion with its settings: all that its result depends on besides the matrix and the seed.

    Args:
        filter_rank: ``r``.
        method: how ``W_r`` is computed: ``"exact"``, by a full SVD, or ``"fast"``, see :mod:`liftdist.engine.factors`.
    """

    filter_rank: int = 64
    method: str = "fast"

    def __post_init__(self) -> None:
        if self.filter_rank < 1:
            raise ValueError(f"filter_rank must be at least 1, got {self.filter_rank}")
        if self.method not in FACTORINGS:
            raise ValueError(f"method must be one of {', '.join(FACTORINGS)}, got {self.method!r}")

    def __call__(self, weight: Tensor, num_selected: int, seed: int) -> Tensor:
        return select(weight, num_selected, self.filter_rank, self.method, seed)

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
    """Flat indices of the ``num_selected`` entries of largest ``|W_r|``.

    Args:
        weight: ``[m, n]``, any floating dtype, on any device.
        num_selected: how many entries, 0 to ``m * n``.
        filter_rank: ``r``; at ``r >= min(m, n)`` the matrix itself is scored.
        method: ``"exact"`` or ``"fast"``.
        seed: seeds the random start of the Krylov space.

    Returns:
        ``[num_selected]`` int64, sorted ascending, on the device of ``weight``. Equal weights on equal hardware give
        equal indices, bit for bit.

    Raises:
        ValueError: the weight holds NaN or infinity, or an argument is out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    if not 0 <= num_selected <= weight.numel():
        raise ValueError(
            f"num_selected must be 0 to {weight.numel()} for shape {tuple(weight.shape)}, got {num_selected}"
        )
    if filter_rank < 1:
        raise ValueError(f"filter_rank must be at least 1, got {filter_rank}")
    if method not in FACTORINGS:
        raise ValueError(f"method must be one of {', '.join(FACTORINGS)}, got {method!r}")
    with torch.no_grad(), _reproducible(weight.device):
        scores_of = _scorer(weight.float(), num_selected, filter_rank, method, seed)
        return top_k(scores_of, weight.shape, num_selected)


def _scorer(matrix: Tensor, num_selected: int, filter_rank: int, method: str, seed: int) -> Callable[[slice], Tensor]:
    """``|W_r|`` of a slice of rows. Holds ``matrix`` only if it is scored itself, so that it can be freed otherwise."""
    if not torch.isfinite(matrix.sum()):
        raise ValueError("weight holds NaN or infinity")
    if filter_rank >= min(matrix.shape):
        return lambda rows: matrix[rows].abs()
    left, right, _ = factor(matrix, num_selected, filter_rank, method, seed)
    return lambda rows: (left[rows] @ right.T).abs_()


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
    choosing = 9 * min(size, BLOCK * 2) + round(24 * CANDIDATE_MARGIN * num_selected)
    return max(factoring, choosing)


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """One thread, no autocast and full float32 products, whatever the caller has set, which is restored."""
    threads = torch.get_num_threads()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    torch.set_num_threads(FACTORING_THREADS)
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
