"""How much each input channel of a matrix matters, for quantisers: QuantLRM (arXiv 2602.02581), as its code computes it.

    x = |new - base|, and x_min, x_mid, x_max its least, median and largest value over all matrices, zeros apart
    y = 1 + 9 ((x_mid - x) / (x_mid - x_min))^2          where x <= x_mid: small changes matter, and large ones
        1 + 9 ((x - x_mid) / (x_max - x_mid))^2          where x > x_mid
        1                                                where x = 0
    importance = mean over rows of y  *  (1 + how many x are 0)                     NAME  [..., columns] float32

One matrix is in memory at a time. Weights that the delta leaves alone have x = 0: of a sparse delta, that is most.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta
from liftdist.errors import UserError

FORMAT = "liftdist-importance-1"
_RISE = 9.0  # of y, from the median to either end


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the importance of the matrices that changed; vectors have no channels, and are left out.

    Raises:
        UserError: the delta holds no base values, no matrix changed, or ``target`` cannot be written.
    """
    ends = _ends(delta)
    tensors, shapes = {}, {}
    for name, shape, indices, x in _changes(delta):
        rows, columns = shape[-2:]
        channels = indices // (rows * columns) * columns + indices % columns
        above, moved = torch.zeros(2, torch.Size(shape).numel() // rows, dtype=torch.float64)
        above.index_add_(0, channels, _y(x.double(), *ends) - 1)
        moved.index_add_(0, channels, (x > 0).double())
        importance = (1 + above / rows) * (1 + rows - moved)
        tensors[name] = importance.view(*shape[:-2], columns).float()
        shapes[name] = list(shape)
    delta_file.save(tensors, target, delta.about() | {"format": FORMAT, "base": delta.base_digest, "shapes": shapes})


def _changes(delta: Delta) -> Iterator[tuple[str, tuple[int, ...], Tensor, Tensor]]:
    """Name, shape, flat indices and absolute changes ``[k]`` float32 of each matrix that changed."""
    for name, change in deltas.changed(delta):
        if change.base is None:
            raise UserError(
                f"{delta.location}: holds no base values, from which changes are told; give a delta that does"
            )
        if not deltas.is_plain(change.dtype):
            raise UserError(
                f"{name} holds {str(change.dtype).removeprefix('torch.')}, of which changes are not those of weights"
            )
        if len(change.shape) > 1:
            x = (change.values.double() - change.base.double()).abs().float()
            yield name, change.shape, change.indices, x


def _ends(delta: Delta) -> tuple[float, float, float]:
    """The least, the median and the largest change. By the upper half of their bits, then exactly."""
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for *_, x in _changes(delta):
        counts += torch.bincount(x[x > 0].view(torch.int32) >> 16, minlength=len(counts))
    upto, number = counts.cumsum(0), int(counts.sum())
    if not number:
        raise UserError(f"{delta.location}: changes no matrix")
    ranks = torch.tensor([0, (number - 1) // 2, number // 2, number - 1])
    bins = torch.searchsorted(upto, ranks, right=True)
    found = [torch.cat([x[x.view(torch.int32) >> 16 == b] for *_, x in _changes(delta)]).sort().values for b in bins]
    least, lower, upper, largest = (
        float(values[int(rank - upto[b] + counts[b])]) for values, rank, b in zip(found, ranks, bins, strict=True)
    )
    return least, (lower + upper) / 2, largest


def _y(x: Tensor, least: float, middle: float, largest: float) -> Tensor:
    below, above = (max(end, 1e-30) for end in (middle - least, largest - middle))
    distance = torch.where(x <= middle, (middle - x) / below, (x - middle) / above).clamp(-1, 1)
    return torch.where(x == 0, 1.0, 1 + _RISE * distance.square())
