"""Blocks of entries that are largest after low-rank approximation: the structured variant of LIFT.

B = the b x b blocks of W [m, n], cut from its first entry; those at its ends may be smaller
S = the blocks of largest mean |W_r|, until there are k entries; of the last block the first ones   (arXiv 2506.00772, 4 x 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.scores import Scores
from liftdist.engine.topk import BLOCK


@dataclass(frozen=True)
class Blocks(LowRank):
    """
    Args:
        block_size: ``b``.
    """

    block_size: int = 4

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        b, (m, n) = self.block_size, weight.shape
        approximation = self.approximation(weight, num_selected, seed)
        step = max(1, BLOCK // (n * b)) * b  # rows, whole blocks
        parts = [_means(approximation(slice(begin, begin + step)).abs_(), b) for begin in range(0, m, step)]
        means = torch.cat(parts)  # [ceil(m / b), ceil(n / b)]
        columns = torch.arange(n, device=weight.device) // b
        return lambda rows: means[torch.arange(m, device=weight.device)[rows] // b][:, columns]


def _means(magnitudes: Tensor, b: int) -> Tensor:
    """The mean of each block of ``[m, n]``, ``[ceil(m / b), ceil(n / b)]``."""
    pool = functional.avg_pool2d(magnitudes[None], b, ceil_mode=True, count_include_pad=False)
    return pool[0]


def make(settings: Any) -> Blocks:
    """From the settings ``filter_rank``, ``method`` and ``block_size``."""
    return Blocks(settings.filter_rank, settings.method, settings.block_size or 4)
