"""Whole matrices, those of most importance whose backward takes a part of the operations; chosen anew at each refresh.

S   = the set of matrices with the largest sum of I_k that costs at most `backward_flops` of what the set of all costs
cost = sum of 2 m_k n_k over S + sum of 2 m_k n_k over all after the first of S     (GreenTrainer, arXiv 2309.13192, eq. 5 to 7)
I_k = sum over batches and entries of g^2, minus sum g dw of a step of SGD, whatever steps the weights: criterion `gradient`

Gradients of weights take 2 m n operations a token, those of inputs as many in each matrix after the first that is trained, where
backward ends. Matrices come in the model's order, so that of two that read the same input the second counts as after the first.
Attention's own products, and that experts see some of the tokens, are left out. Solved by dynamic programming in steps of
1 / 2048 of all operations, rounded up. GreenTrainer chooses between epochs, by another batch each time; here each refresh goes by
the run's first batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from liftdist.errors import UserError

STEPS = 2048


@dataclass(frozen=True)
class GreenTrainer:
    """
    Args:
        backward_flops: share of the operations of a backward that trains all matrices, above 0 and at most 1.
    """

    backward_flops: float
    compares: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """All weights, of which :meth:`divide` leaves those of some matrices."""
        return {name: m * n for name, (m, n) in shapes.items()}

    def divide(self, counts: Sequence[int], importance: Sequence[float], most: Sequence[int]) -> list[int]:
        """Of each matrix ``most``, all that can be taken of its ``counts`` weights, or none. Raises ``UserError`` if no matrix is
        cheap enough."""
        chosen = knapsack(importance, counts, self.backward_flops)
        if not any(chosen):
            raise UserError(
                f"selection.backward_flops={self.backward_flops}: no matrix can be trained with so few operations; raise it"
            )
        return [number if taken else 0 for number, taken in zip(most, chosen, strict=True)]


def knapsack(importance: Sequence[float], costs: Sequence[int], share: float) -> list[bool]:
    """Which matrices are trained.

    Args:
        costs: of the gradient of each matrix's weights, and of that of its inputs, in the order of the forward.
        share: of the costs of training all.
    """
    everything = 2 * sum(costs) - costs[0]  # inputs of the first need no gradient
    step = everything / STEPS
    room = int(share * STEPS + 1e-9)
    steps = [int(np.ceil(cost / step)) if share < 1 else 0 for cost in costs]
    best = np.zeros(room + 1)  # by steps for gradients of weights, of the matrices from the last one on
    taken = np.zeros((len(costs), room + 1), dtype=bool)
    after, found = 0.0, (0.0, len(costs), 0)  # value, first matrix, steps left for gradients of weights
    for place in range(len(costs) - 1, -1, -1):
        own = steps[place]
        if own <= room:
            with_it = np.full(room + 1, -np.inf)
            with_it[own:] = best[: room + 1 - own] + importance[place]
            taken[place] = with_it > best
            best = np.maximum(best, with_it)
        left = room - int(np.ceil(after / step)) if share < 1 else room
        if left >= 0 and best[left] > found[0]:
            found = float(best[left]), place, left
        after += costs[place]
    chosen = [False] * len(costs)
    _, first, left = found
    for place in range(first, len(costs)):
        if taken[place, left]:
            chosen[place] = True
            left -= steps[place]
    return chosen


def make(settings: Any) -> GreenTrainer:
    """From the setting ``backward_flops``."""
    return GreenTrainer(settings.backward_flops)
