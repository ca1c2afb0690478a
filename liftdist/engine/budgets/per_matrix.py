"""A budget for each matrix, from its own size.

    k = round(density m n)        or        k = min(R (m + n), m n), as many weights as a LoRA of rank R has

The second is the LIFT paper's (arXiv 2506.00772, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerMatrix:
    """Exactly one of ``density``, above 0 and at most 1, and ``budget_rank`` ``R``. Raises ``ValueError`` otherwise."""

    density: float | None = None
    budget_rank: int | None = None

    def __post_init__(self) -> None:
        if (self.density is None) == (self.budget_rank is None):
            raise ValueError(f"give exactly one of density and budget_rank, got {self.density} and {self.budget_rank}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        if self.budget_rank is not None and self.budget_rank < 1:
            raise ValueError(f"budget_rank must be at least 1, got {self.budget_rank}")

    def allot(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Weights to train of each matrix, by name."""
        return {name: self._count(m, n) for name, (m, n) in shapes.items()}

    def _count(self, m: int, n: int) -> int:
        if self.density is not None:
            return round(self.density * (m * n))
        assert self.budget_rank is not None
        return min(self.budget_rank * (m + n), m * n)


def make(settings: Any) -> PerMatrix:
    """From the settings ``density`` and ``budget_rank``."""
    return PerMatrix(settings.density, settings.budget_rank)
