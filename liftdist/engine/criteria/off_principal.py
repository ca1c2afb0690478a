"""The smallest entries outside the principal ones: where reinforcement learning is reported to change weights.

P = the k entries of largest |W_r|
S = the k entries of smallest |W| that are not in P          (after arXiv 2511.08567 and 2602.01599)

The papers describe where updates of full fine-tuning fall: away from principal entries, and on small ones. Training only such
entries is this criterion's conclusion; of the two they give no single order. Above half of a matrix P shrinks to what S leaves.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.criteria.low_rank import LowRank
from liftdist.engine.scores import Scores, choosing, inverted
from liftdist.engine.topk import top_k


class OffPrincipal(LowRank):
    """The smallest of the others."""

    are_magnitudes: ClassVar[bool] = False

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        approximation = self.approximation(weight, num_selected, seed)
        principal = top_k(
            lambda rows: approximation(rows).abs_(), weight.shape, min(num_selected, weight.numel() - num_selected)
        )
        scores = inverted(weight)
        scores.view(-1)[principal] = 0
        return lambda rows: scores[rows]

    def workspace(self, m: int, n: int, num_selected: int) -> int:
        return max(super().workspace(m, n, num_selected), 8 * m * n + choosing(m, n, num_selected))


def make(settings: Any) -> OffPrincipal:
    """From the settings ``filter_rank`` and ``method``."""
    return OffPrincipal(settings.filter_rank, settings.method)
