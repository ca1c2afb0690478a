"""The segments of the flat vector that belong to one matrix and to one parameter; which weights were selected previously.

values[begin : begin + k_local] = W_local.flat[indices]         one bit per weight marks previous selections

The matrices of a parameter have adjacent segments, so that one pass over the memory of the parameter serves them all. Positions
are where the flat vector is, on the model's device or on the host, and are brought to the model where they are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liftdist.distributed.sharding import local_tensor
from liftdist.engine import bits, host, memory
from liftdist.engine.matrices import Matrix
from liftdist.engine.reductions import FSDPReduction


@dataclass
class Segment:
    """A matrix and its segment of the flat vector."""

    matrix: Matrix
    kept: Tensor  # positions, as they are kept
    begin: int
    past: Tensor | None = None  # [ceil(m_local n / 8)] uint8, one bit per weight: previously selected

    @property
    def positions(self) -> Tensor:
        """``[k_local]`` int32, into the memory of the parameter, see matrices.py; on its device."""
        return self.kept.to(self.matrix.device, non_blocking=True)

    @property
    def indices(self) -> Tensor:
        """``[k_local]`` int32, into this rank's rows of the matrix, sorted."""
        return self.matrix.indices(self.positions)

    @property
    def span(self) -> slice:
        return slice(self.begin, self.begin + self.kept.numel())

    @property
    def dropped(self) -> Tensor:
        """``[d_local]`` int64 sorted flat indices of previously selected weights that are not selected now."""
        if self.past is None:
            return torch.empty(0, dtype=torch.int64, device=self.matrix.device)
        flags = bits.unpack(self.past, self.matrix.numel_local)
        flags[self.indices] = False
        return flags.nonzero().squeeze(1)

    def past_and_present(self) -> Tensor:
        """``past`` for the next selection: the previously selected weights and those selected now."""
        return bits.pack(self.selected_ever())

    def selected_ever(self) -> Tensor:
        """``[m_local n]`` bool: the previously selected weights and those selected now."""
        if self.past is None:
            flags = torch.zeros(self.matrix.numel_local, dtype=torch.bool, device=self.matrix.device)
        else:
            flags = bits.unpack(self.past, self.matrix.numel_local)
        flags[self.indices] = True
        return flags


@dataclass
class Part:
    """A parameter that holds trained matrices, and its segment of the flat vector."""

    param: nn.Parameter
    kept: Tensor  # positions, as they are kept
    begin: int
    reduction: FSDPReduction | None

    @property
    def positions(self) -> Tensor:
        """``[k_local]`` int32, into this rank's part of the parameter; on its device."""
        return self.kept.to(self.device, non_blocking=True)

    @property
    def device(self) -> torch.device:
        return local_tensor(self.param).device

    def read(self, positions: Tensor) -> Tensor:
        """``[k]`` in the dtype of the parameter: its weights at ``positions [k]``."""
        return memory.read(self.param, positions)

    def write(self, positions: Tensor, weights: Tensor) -> None:
        """Set the weights at ``positions [k]``, on any device, to ``weights [k]``, rounded to the dtype of the parameter."""
        memory.write(self.param, positions, weights)

    @property
    def span(self) -> slice:
        return slice(self.begin, self.begin + self.kept.numel())


def lay_out(
    matrices: Sequence[Matrix],
    indices: Sequence[Tensor],
    reductions: Mapping[int, FSDPReduction],
    on_host: bool = False,
) -> tuple[list[Segment], list[Part]]:
    """The segments of matrices, and those of the parameters that hold them.

    Args:
        matrices: those of a parameter adjacent.
        indices: of each, ``[k_local]`` into this rank's rows, sorted.
        reductions: how the gradient of each parameter is reduced, by its ``id``.
        on_host: keep positions there.
    """
    segments: list[Segment] = []
    parts: list[Part] = []
    begin = 0
    for _, group in itertools.groupby(zip(matrices, indices, strict=True), lambda pair: id(pair[0].param)):
        pairs = list(group)
        param, device = pairs[0][0].param, pairs[0][0].device
        found = [matrix.positions(chosen.to(device, torch.int32)).contiguous() for matrix, chosen in pairs]
        whole = torch.cat(found) if len(found) > 1 else found[0]
        whole = host.kept(whole) if on_host else whole
        parts.append(Part(param, whole, begin, reductions.get(id(param))))
        for (matrix, _), own in zip(pairs, whole.split([part.numel() for part in found]), strict=True):
            segments.append(Segment(matrix, own, begin))
            begin += own.numel()
    return segments, parts


def former(old: Segment, new: Segment) -> Tensor:
    """``[k_local]`` int64: for each index of ``new`` its place in the flat vector of ``old``, or -1."""
    before, after = old.indices, new.indices
    if not before.numel() or not after.numel():
        return torch.full_like(after, -1, dtype=torch.int64)
    place = torch.searchsorted(before, after).clamp_max(before.numel() - 1)
    return torch.where(before[place] == after, place + old.begin, -1)
