"""Each matrix in proportion to the sum of its scores; the whole may shrink from one selection to the next.

K_0 = the sum over matrices of the number that `per_matrix` gives them, K_T the same for `final_density`
K   = K_T + (K_0 - K_T) (1 - r / R)^3 at refresh r, K_T from refresh R on; K_0 without `final_density`
k_j = K s_j / sum s, s_j the sum of the scores of matrix j, at most all of its entries

The curve is that of AdaLoRA (arXiv 2303.10512), which allots ranks; entries are allotted so by SNELLA.

What a full matrix cannot take goes to the others in their proportions, and last to those whose scores are all 0, by size. AdaLoRA
prunes every few steps, here it is each refresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from liftdist.engine.apportion import apportion
from liftdist.engine.budgets.per_matrix import PerMatrix


@dataclass(frozen=True)
class Sensitivity(PerMatrix):
    """
    Args:
        final_density: share of the weights that is trained from refresh ``final_refresh`` on; ``density`` always if unset.
    """

    final_density: float | None = None
    final_refresh: int = 1
    compares: ClassVar[bool] = True
    redraws: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]], refreshes: int = 0) -> dict[str, int]:
        """Numbers whose sum is divided by the scores, by name."""
        first = super().allot(shapes)
        if self.final_density is None:
            return first
        last = sum(PerMatrix(self.final_density).allot(shapes).values())
        left = (1 - min(refreshes / self.final_refresh, 1)) ** 3
        total = round(last + (sum(first.values()) - last) * left)
        sizes = [m * n for m, n in shapes.values()]
        return dict(zip(shapes, apportion(total, sizes, sizes), strict=True))

    def divide(self, counts: Sequence[int], sums: Sequence[float], most: Sequence[int]) -> list[int]:
        """The sum of ``counts`` in proportion to ``sums``, of the scores of each matrix; ``most`` is how many can be taken.

        Where matrices with scores above 0 cannot take all of it, the others get the rest by their size.
        """
        total = min(sum(counts), sum(most))
        room = sum(number for number, scores in zip(most, sums, strict=True) if scores)
        taken = apportion(min(total, room), sums, most)
        free = [number - count for number, count in zip(most, taken, strict=True)]
        return [count + more for count, more in zip(taken, apportion(total - sum(taken), free, free), strict=True)]


def make(settings: Any) -> Sensitivity:
    """From the settings ``density``, ``budget_rank``, ``final_density`` and ``final_refresh``."""
    return Sensitivity(settings.density, settings.budget_rank, settings.final_density, settings.final_refresh or 1)
