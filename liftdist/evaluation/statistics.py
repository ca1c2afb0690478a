"""How sure a mean score, or another statistic of scores, is, and whether two lists of scores differ. On numpy alone.

bootstrap: percentile interval of a statistic                     (Efron and Tibshirani 1993, section 13.3)
paired:    exact McNemar test where all scores are 0 or 1         (McNemar 1947; both tails of the binomial distribution)
           bootstrap test of the mean difference elsewhere        (Efron and Tibshirani 1993, section 16.4)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000


def bootstrap(
    scores: ArrayLike, statistic: Callable[[np.ndarray], float] = np.mean, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a statistic of ``scores``, ``[questions, ...]``. Raises ``ValueError`` if there are none."""
    low, high = np.percentile(_drawn(np.asarray(scores, np.float64), statistic, seed), [2.5, 97.5])
    return float(low), float(high)


def paired(first: ArrayLike, second: ArrayLike, seed: int = 0) -> float:
    """The two-sided p-value of the hypothesis that both have the same mean, of scores of the same questions in the same order.

    Args:
        seed: of the bootstrap; McNemar's test needs none.

    Raises:
        ValueError: there are no scores, or not as many in both.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} scores: must be of the same questions")
    if not a.size:
        raise ValueError("no scores")
    difference = b - a
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
        return float(min(1.0, 2 * tail / 2 ** (better + worse)))
    extreme = (
        np.abs(_drawn(difference - difference.mean(), np.mean, seed)) >= abs(difference.mean()) - 1e-12
    )  # rounding
    return float((1 + extreme.sum()) / (1 + DRAWS))


def _drawn(values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int) -> np.ndarray:
    """``[DRAWS]``, the statistic of as many values, drawn with replacement."""
    if not values.size:
        raise ValueError("no scores")
    random = np.random.default_rng(seed)
    return np.array([statistic(values[random.integers(0, len(values), len(values))]) for _ in range(DRAWS)])
