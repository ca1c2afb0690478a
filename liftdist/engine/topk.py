"""Exact top-k of the scores of a matrix without holding all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CANDIDATE_ROWS = 32  # rows sampled to estimate the threshold
CANDIDATE_MARGIN = 1.3  # entries intended above the estimate, in multiples of k
BLOCK = 2**24  # entries per block of rows


def top_k(scores_of: Callable[[slice], Tensor], shape: Sequence[int], k: int) -> Tensor:
    """Sorted flat indices (int64) of the ``k`` largest scores of an ``[m, n]`` matrix, ties to the lowest index.

    A sample of rows gives an estimate of the threshold. One pass, a block of rows at a time, keeps the entries above it, slightly
    more than ``k``, and the k-th largest of those is the threshold. Only one block of scores exists at a time.

    Args:
        scores_of: the scores of a slice of rows, ``[rows, n]`` float32. Negative ones are never taken.

    Raises:
        ValueError: the scores are not float32, or fewer than ``k`` are finite and not negative.
    """
    m, n = shape
    sample = scores_of(slice(None, None, max(1, m // CANDIDATE_ROWS))).reshape(-1)
    if sample.dtype != torch.float32:
        raise ValueError(f"scores must be float32, got {sample.dtype}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=sample.device)
    share = CANDIDATE_MARGIN * k / (m * n)
    while True:
        place = sample.numel() - int(share * sample.numel())
        bound = sample.kthvalue(place).values if place >= 1 else sample.new_zeros(())
        found = [_at_least(scores_of(slice(b, b + block)), bound, b * n) for b, block in blocks(m, n)]
        indices, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
        if indices.numel() >= k:
            break
        if place < 1:
            raise ValueError(f"fewer than {k} scores are finite and not negative")
        share *= 2  # the sample was not representative
    kth = scores.kthvalue(scores.numel() - k + 1).values
    selected = scores > kth
    ties = (scores == kth).nonzero().squeeze(1)
    selected[ties[: k - int(selected.sum())]] = True
    return indices[selected]


def blocks(m: int, n: int) -> list[tuple[int, int]]:
    """``(first row, rows)`` of each block. Depends on the shape only: rounding of products depends on the block's shape."""
    rows = max(1, BLOCK // n)
    return [(begin, min(rows, m - begin)) for begin in range(0, m, rows)]


def _at_least(scores: Tensor, bound: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Flat indices, plus ``offset``, and scores of the entries of a block that are at least ``bound``."""
    flat = scores.reshape(-1)
    indices = (flat >= bound).nonzero().squeeze(1)
    return indices + offset, flat[indices]
