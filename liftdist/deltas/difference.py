"""Changes told from the weights that they change, as a compressed delta holds them: neither base nor new values.

    exact     new = bits^-1(bits(base) + step)                    base = bits^-1(bits(new) - step)
    lossy     new = round(base + step)                            base = bits^-1(bits(round(new - step)) + correction)

``step`` is a whole number for each weight where all is kept, and a difference in float32 where not. ``correction`` makes up for
the rounding, so that both directions are right to the bit. It is 0 for nearly all weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liftdist.deltas.delta import Change, Delta, bits
from liftdist.errors import UserError

if TYPE_CHECKING:
    from liftdist.models.weights import ModelFolder  # with libraries that a server may lack


ITS_BASE = "--base must name its base"


@dataclass(frozen=True)
class Difference:
    """What changed in one tensor, for the one that knows what it holds."""

    shape: tuple[int, ...]
    stored: torch.dtype  # dtype in the base model's file
    indices: Tensor  # [k] int64, flat, sorted
    dtype: torch.dtype  # of the new values, which represents base values exactly
    steps: Tensor  # [k], integers as wide as dtype, or float32
    corrections: Tensor | None = None  # [k], integers as wide as stored; with steps in float32

    @property
    def undoable(self) -> bool:
        return True

    def part(self, places: slice) -> Difference:
        """The difference at some of its weights."""
        corrections = None if self.corrections is None else self.corrections[places]
        return replace(self, indices=self.indices[places], steps=self.steps[places], corrections=corrections)

    def applied(self, before: Tensor) -> Change:
        """The change of base values ``[k]``."""
        base = before.to(self.dtype)
        values = (
            (bits(base) + self.steps).view(self.dtype)
            if self.corrections is None
            else moved(base, self.steps, self.dtype)
        )
        return Change(self.shape, self.stored, self.indices, values, base)

    def undone(self, after: Tensor) -> Change:
        """The change that led to new values ``[k]``."""
        values = after.to(self.dtype)
        if self.corrections is None:
            base = (bits(values) - self.steps).view(self.dtype)
        else:
            base = bits(moved(values, -self.steps, self.stored)) + self.corrections
            base = base.view(self.stored).to(self.dtype)
        return Change(self.shape, self.stored, self.indices, values, base)


def moved(values: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """``values + steps``, added in float32 or wider, then rounded once: the same on any machine."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return (values.to(wide) + steps.to(wide)).to(dtype)


def lossy(change: Change, chosen: Tensor, steps: Tensor) -> Difference:
    """A change by ``steps`` ``[c]`` float32 at ``chosen`` ``[c]`` of its weights, but those that would not move, or overflow.

    The change must hold base values."""
    assert change.base is not None
    base = change.base[chosen]
    values = moved(base, steps, base.dtype)
    moves = (bits(values) != bits(base)) & values.float().isfinite()
    base, steps, indices = base[moves], steps[moves], change.indices[chosen][moves]
    values = moved(base, steps, base.dtype)
    guess = moved(values, -steps, change.stored)
    corrections = bits(base.to(change.stored)) - bits(guess)
    return Difference(change.shape, change.stored, indices, base.dtype, steps, corrections)


def exact(change: Change) -> Difference:
    """A change as it is. It must hold base values."""
    assert change.base is not None
    steps = bits(change.values) - bits(change.base)
    return Difference(change.shape, change.stored, change.indices, change.values.dtype, steps)


def squared_error(change: Change, found: Difference) -> float:
    """``||tau - tau'||_2^2`` of a change ``tau`` and of what a difference does to its base values, rounding included."""
    assert change.base is not None
    tau = change.values.double() - change.base.double()
    places = torch.searchsorted(change.indices, found.indices)
    made = found.applied(change.base[places])
    assert made.base is not None
    tau[places] -= made.values.double() - made.base.double()
    return float(tau @ tau)


def on(delta: Delta, base: ModelFolder) -> Delta:
    """A delta whose changes hold values and base values, taken from its base model where the file holds neither."""

    def get(name: str) -> Change:
        change = delta.get(name)
        if isinstance(change, Change) and change.base is not None:
            return change
        before = at(base, name, change.shape, change.indices, f"{delta.location} is", ITS_BASE)
        if isinstance(change, Difference):
            return change.applied(before)
        return replace(change, base=before.to(change.values.dtype))

    return replace(delta, get=get, compressed=False)


def at(folder: ModelFolder, name: str, shape: tuple[int, ...], indices: Tensor, whose: str, remedy: str) -> Tensor:
    """Weights ``[k]`` of a tensor in a folder, in its dtype. Raises ``UserError`` unless it has the shape of the delta's.

    Args:
        whose: begins what the message says of the delta, as ``"math.delta is"``.
    """
    found = tuple(folder.info(name)["shape"]) if name in folder.file_of else None
    if found != shape:
        what = f"has no {name}" if found is None else f"{name} is {list(found)}"
        raise UserError(f"{folder.folder}: {what}, {whose} for {list(shape)}; {remedy}")
    return folder.read(name).flatten()[indices]
