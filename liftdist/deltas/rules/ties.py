"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, and average those that have it.

T_i = the share ``density`` of D_i that is largest        s = sign of sum_i T_i        mean of w_i T_i over i with sign T_i = s

Deviations: trimmed by tensor, not by model, and the share is of the weights that a delta changes. ``peft.utils.merge_utils`` has
the rule, too, but elects + where changes cancel each other, which in bf16 many do; here, as in the paper, none remains.
"""

from __future__ import annotations

from torch import Tensor

from liftdist.deltas.rules.breadcrumbs import between
from liftdist.errors import UserError


def merge(differences: Tensor, *, weights: Tensor, density: float) -> Tensor:
    if (weights <= 0).any():
        raise UserError(
            "--weights: --rule ties elects signs before it weighs; give positive weights, or take --rule sum"
        )
    trimmed = between(differences, 1 - density, 0.0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return weights @ (trimmed * agree) / agree.sum(0).clamp(min=1)
