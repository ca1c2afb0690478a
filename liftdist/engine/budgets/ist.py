"""Some decoder layers, drawn by their importance, which is learned from trials; each matrix in them by its own size.

I_l = 0 at the start; at each refresh, in each of 3 trials on the same batches: what half of the layers, at random, has learned is
      scaled by 0.25; the reward is r = exp(-loss) less the mean over the trials; I_l += 10 r s(I_l) (1 - s(I_l)) of these layers
L   = `layers` decoder layers, without replacement, with probabilities in proportion to s(-I_l)      (IST, arXiv 2408.11304)

s is the logistic function: a layer that is scaled down where the loss stays low is needed less. IST draws at every step, tries
every 10 steps, on another batch each time, and trains adapters; here both happen at a refresh, all trials on the run's first
batches, and the criterion says which weights of a layer are trained. Its code draws the layers of a trial by s(I_l), never
the same twice; here all are as likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from liftdist.engine.budgets.layers import layer_of, layers_of
from liftdist.engine.budgets.per_matrix import PerMatrix

TRIALS, SCALE, RATE = 3, 0.25, 10.0


@dataclass(frozen=True)
class Ist(PerMatrix):
    """
    Args:
        layers: how many are trained at a time; the authors take a quarter.
        seed: another seed draws others.
    """

    layers: int = 1
    seed: int = 0
    redraws: ClassVar[bool] = True

    def allot(
        self, shapes: Mapping[str, tuple[int, int]], refreshes: int = 0, importance: Mapping[str, float] | None = None
    ) -> dict[str, int]:
        """Weights to train of each matrix, by name. Raises ``UserError`` if there are fewer layers than that."""
        every = layers_of(shapes, self.layers)
        odds = np.array([_logistic(-(importance or {}).get(layer, 0.0)) for layer in every])
        random = np.random.default_rng([self.seed, refreshes])
        drawn = set(random.choice(every, self.layers, replace=False, p=odds / odds.sum()))
        return {name: number if layer_of(name) in drawn else 0 for name, number in super().allot(shapes).items()}

    def learn(
        self,
        importance: Mapping[str, float],
        shapes: Mapping[str, tuple[int, int]],
        refreshes: int,
        loss_of: Callable[[Callable[[str], float]], float],
    ) -> dict[str, float]:
        """The importance of each layer after more trials.

        Args:
            loss_of: the loss where a factor, a function of the name of a matrix, scales what each matrix has learned.
        """
        every = layers_of(shapes, self.layers)
        random = np.random.default_rng([self.seed, refreshes, 1])
        halves = [set(random.choice(every, max(len(every) // 2, 1), replace=False)) for _ in range(TRIALS)]

        def reward(half: set[str]) -> float:
            return math.exp(-loss_of(lambda name: SCALE if layer_of(name) in half else 1.0))

        found = [reward(half) for half in halves]
        now = {layer: importance.get(layer, 0.0) for layer in every}
        for half, one in zip(halves, found, strict=True):
            for layer in half:
                slope = _logistic(now[layer]) * (1 - _logistic(now[layer]))
                now[layer] += RATE * (one - sum(found) / TRIALS) * slope
        return now


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def make(settings: Any) -> Ist:
    """From the settings ``density``, ``budget_rank``, ``layers`` and ``seed``."""
    return Ist(settings.density, settings.budget_rank, settings.layers, settings.seed or 0)
