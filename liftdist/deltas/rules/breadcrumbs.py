"""Model Breadcrumbs (Davari and Belilovsky 2024, arXiv 2312.06795): neither outliers nor small changes.

sum_i w_i M_i D_i        M_i: all changes of the tensor but the share ``beta`` that is smallest and ``gamma`` that is largest

Shares are of the weights that a delta changes in a tensor, not of all weights, of which a sparse delta changes few. ``gamma``
counts the outliers, as mergekit's does; the paper's is 1 less it. Both are taken of a whole tensor; the authors' code masks
each row by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liftdist.errors import UserError


def merge(differences: Tensor, *, weights: Tensor, beta: float, gamma: float) -> Tensor:
    if beta + gamma >= 1:
        raise UserError(
            f"--beta {beta:g} --gamma {gamma:g}: together they drop every change; their sum must be below 1"
        )
    return weights @ between(differences, beta, gamma)


def between(differences: Tensor, beta: float, gamma: float) -> Tensor:
    """``[n, k]``: 0 for the smallest and largest of the changes of each row, of which one at least stays; of equal ones the first
    count as smaller."""
    kept = torch.zeros_like(differences)
    for row, result in zip(differences, kept, strict=True):
        order, changed = row.abs().argsort(stable=True), int(row.count_nonzero())  # those that are 0 come first
        most = max(changed - 1, 0)  # that may be dropped
        largest = min(round(gamma * changed), most)
        smallest = min(round(beta * changed), most - largest)
        chosen = order[len(row) - changed + smallest : len(row) - largest]
        result[chosen] = row[chosen]
    return kept
