"""Shares by the names of matrices: some kinds get more weights than others.

K   = sum over matrices of the number k_j that `per_matrix` gives them
k_j = K s_j n_j / sum of s n      n_j entries of the matrix; s_j the share of the first pattern that fits, or k_j / n_j

None above n_j: what is cut off goes to the others. Zero trains nothing of a kind. ``["*.mlp.*=1", "*=0"]`` is LIFT_MLP
of arXiv 2506.00772, with the budget of the attention spent on the MLPs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from liftdist.engine.apportion import apportion
from liftdist.engine.budgets.per_matrix import PerMatrix
from liftdist.errors import UserError


@dataclass(frozen=True)
class ByPattern(PerMatrix):
    """
    Args:
        shares: pairs of a pattern of module names (``*``, ``?``, ``[]``) and a share, 0 or more; the first that fits counts.
    """

    shares: tuple[tuple[str, float], ...] = ()

    def allot(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Weights to train of each matrix, by name. Raises ``UserError`` if a pattern fits none, or too few are left."""
        own = super().allot(shapes)
        sizes = [m * n for m, n in shapes.values()]
        modules = {name: name.removesuffix(".weight") for name in shapes}
        for pattern, _ in self.shares:
            if not any(fnmatch.fnmatchcase(module, pattern) for module in modules.values()):
                example = next(iter(modules.values()))
                raise UserError(f"selection.shares: {pattern} fits no trained module; one is named {example}")

        def weight(name: str, size: int) -> float:
            given = (share for pattern, share in self.shares if fnmatch.fnmatchcase(modules[name], pattern))
            share = next(given, None)
            return own[name] if share is None else share * size

        weights = [weight(name, size) for name, size in zip(shapes, sizes, strict=True)]
        try:
            return dict(zip(shapes, apportion(sum(own.values()), weights, sizes), strict=True))
        except ValueError as error:
            raise UserError(f"selection.shares: {error}; raise a share, or lower density or budget_rank") from None


def make(settings: Any) -> ByPattern:
    """From the settings ``density`` or ``budget_rank``, and ``shares``."""
    pairs = [share.rpartition("=") for share in settings.shares]
    return ByPattern(
        settings.density, settings.budget_rank, tuple((pattern, float(share)) for pattern, _, share in pairs)
    )
