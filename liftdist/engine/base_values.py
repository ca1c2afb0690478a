"""The values that trained weights had in the base model: 6 B for each weight that was ever selected, in a bf16 model.

A weight has its base value until it is selected for the first time. It is read then, and kept, whatever becomes of the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from liftdist.engine.flat import Part


class BaseValues:
    """Of the parameters that hold trained matrices, in their order: where weights were ever selected, and what they were."""

    def __init__(self) -> None:
        self._positions: list[Tensor] = []  # [t] int32 sorted, into the memory of the parameter
        self._values: list[Tensor] = []  # [t] in the dtype of the parameter

    def add(self, parts: Sequence[Part]) -> None:
        """Read the values at the positions that are new. The model must not have trained them yet."""
        if not self._positions:
            self._positions = [part.positions[:0] for part in parts]
            self._values = [part.read(part.positions[:0]) for part in parts]
        for number, part in enumerate(parts):
            known, values = self._positions[number], self._values[number]
            new = part.positions[~torch.isin(part.positions, known)]
            merged, order = torch.cat([known, new]).sort()
            self._positions[number] = merged
            self._values[number] = torch.cat([values, part.read(new)])[order]

    def of(self, parts: Sequence[Part]) -> list[Tensor]:
        """``[k_local]`` for each parameter: the base values of the selected weights."""
        triples = zip(parts, self._positions, self._values, strict=True)
        return [values[torch.searchsorted(known, part.positions)] for part, known, values in triples]

    @contextlib.contextmanager
    def swapped_in(self, parts: Sequence[Part]) -> Iterator[None]:
        """Within the context the memory of the parameters holds the base values, and this object what they held; afterwards the
        other way round again, to the bit."""
        self.swap(parts)
        try:
            yield
        finally:
            self.swap(parts)

    @contextlib.contextmanager
    def scaled(self, parts: Sequence[Part], factors: Sequence[float]) -> Iterator[None]:
        """Within the context what each part has learned is multiplied by its factor; afterwards it is as before, to the bit."""
        before = [part.read(held) for part, held in zip(parts, self._positions, strict=True)]
        for part, where, base, learned, factor in zip(
            parts, self._positions, self._values, before, factors, strict=True
        ):
            part.write(where, learned if factor == 1 else base.lerp(learned, factor))
        try:
            yield
        finally:
            for part, where, learned in zip(parts, self._positions, before, strict=True):
                part.write(where, learned)

    @torch.no_grad()
    def swap(self, parts: Sequence[Part]) -> None:
        """Let the memory of the parameters and this object exchange what they hold, to the bit."""
        for part, positions, values in zip(parts, self._positions, self._values, strict=True):
            held = part.read(positions)
            part.write(positions, values)
            values.copy_(held)
