"""Entries that have moved least make room for those that the gradient wants to move most.

first      S = the k entries of largest |sum over batches of g|
refresh t  drop the p_t k entries of S of smallest |w - w_base|: they get their base values back
           grow as many outside S of largest |sum over batches of g|, with moments of mean g and mean g^2
           p_t = 0.2 (1 - t / T), T = `final_refresh`                  (SpIEL-AG, arXiv 2401.16405, section 3)

SpIEL begins with entries at random, all of which its first refresh replaces. It sums gradients over training steps and for the
candidates of the first of them; here they are gathered for all entries, over the same batches at each refresh: the run's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liftdist.engine.gathered import Gathered
from liftdist.engine.matrices import Matrix
from liftdist.engine.scores import LARGEST, Scored, Scores
from liftdist.engine.topk import top_k

REPLACED = 0.2  # at the first refresh, were it refresh 0


@dataclass(frozen=True)
class Spiel(Gathered):
    """
    Args:
        final_refresh: ``T``; from it on nothing is replaced.
    """

    batches: int = 5
    final_refresh: int = 1
    states: ClassVar[int] = 3  # sum, sum of squares, statistic
    are_magnitudes: ClassVar[bool] = False
    replaces: ClassVar[bool] = True

    def add(self, states: Sequence[Tensor], gradient: Tensor, weight: Tensor) -> None:
        states[0].add_(gradient)
        states[1].addcmul_(gradient, gradient)

    def statistic(self, states: Sequence[Tensor]) -> Tensor:
        return states[2].copy_(states[0]).abs_()

    def of(self, matrix: Matrix, refreshes: int) -> Scored:
        """The criterion at a refresh."""
        return _Replace(REPLACED * max(1 - refreshes / self.final_refresh, 0.0))


@dataclass(frozen=True)
class _Replace(Scored):
    """
    Args:
        fraction: ``p_t``.
    """

    fraction: float

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        """Of the statistic: entries of S are marked by their sign, with their movement as absolute value."""
        trained = weight.signbit()
        number = int(trained.sum())
        kept = min(number - round(self.fraction * number), num_selected)
        if kept > 0:
            moved = torch.where(trained, weight.abs(), -1.0)
            stays = top_k(lambda rows: moved[rows], weight.shape, kept)
            weight.masked_fill_(trained, 0.0).view(-1)[stays] = LARGEST
        return lambda rows: weight[rows]


def make(settings: Any) -> Spiel:
    """From the settings ``gradient_batches`` and ``final_refresh``."""
    return Spiel(settings.gradient_batches or Spiel.batches, settings.final_refresh or 1)
