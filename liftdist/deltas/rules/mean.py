"""Model soup (Wortsman et al. 2022, arXiv 2203.05482): the mean of the models, ``sum_i w_i D_i / sum_i w_i``."""

from __future__ import annotations

from torch import Tensor

from liftdist.errors import UserError


def merge(differences: Tensor, *, weights: Tensor) -> Tensor:
    if weights.sum() <= 0:
        raise UserError(f"--weights {','.join(f'{w:g}' for w in weights)}: a mean needs weights with a positive sum")
    return weights / weights.sum() @ differences
