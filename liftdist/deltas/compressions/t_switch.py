"""T-Switch (Qi et al., CVPR 2025, arXiv 2412.00054): which changes, their signs, and one size for all of a tensor.

    S = the largest 1 - alpha of the positive and of the negative entries of tau
    tau is replaced by c sign(tau) on S, 0 elsewhere        c = ||tau_S||_2 / ||sign(tau_S)||_2

As in the authors' code, numbers of entries are rounded down. Deviations: shares are of the entries that the delta changes. Where
nothing would be left of a sign, its largest entry is; the authors' code keeps all then. Of equal entries the first are kept, so
that their number is right. Entries that rounding to the dtype of the weights would leave where they are, are not stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liftdist.deltas import difference
from liftdist.deltas.compressed import multiples
from liftdist.deltas.compressions import Changes, Coding
from liftdist.deltas.delta import Change
from liftdist.deltas.difference import Difference
from liftdist.errors import UserError


def plan(changes: Changes, *, alpha: float) -> Coding:
    if not 0 <= alpha < 1:
        raise UserError(f"--alpha {alpha:g}: must be at least 0 and below 1")

    def code(name: str, change: Change) -> tuple[Difference, float]:
        return quantised(change, alpha, 1, norm=True)

    return code


def quantised(change: Change, alpha: float, bits: int, norm: bool = False) -> tuple[Difference, float]:
    """The largest 1 - ``alpha`` of a change's differences, each a whole multiple of one scale of ``2^bits`` multiples: 1 to
    ``2^(bits - 1)`` of either sign; and the scale.

    Args:
        norm: take the scale that keeps the norm of these differences, not the one of least error.
    """
    assert change.base is not None
    tau = change.values.double() - change.base.double()
    chosen = kept(tau, alpha)
    tau = tau[chosen]
    largest = 1 << (bits - 1)
    sizes = torch.ones_like(tau)
    if largest > 1 and len(tau):
        sizes = (tau.abs() * (largest / tau.abs().max())).round().clamp(1, largest)
    squares = (sizes**2).sum()
    scale = (tau**2).sum().div(squares).sqrt() if norm else (tau.abs() * sizes).sum() / squares
    exact = float(scale.float()) if len(tau) else 0.0
    return difference.lossy(change, chosen, multiples(sizes, tau.sign(), exact)), exact


def kept(tau: Tensor, alpha: float) -> Tensor:
    """Sorted places of the largest ``1 - alpha`` of the positive and of the negative entries, one at least of each that exist."""
    found = []
    for part in (tau > 0, tau < 0):
        places = part.nonzero().squeeze(1)
        count = max(int(len(places) * (1 - alpha)), min(1, len(places)))
        found.append(places[tau[places].abs().argsort(descending=True, stable=True)[:count]])
    return torch.cat(found).sort().values
