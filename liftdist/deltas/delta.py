"""The sparse difference between a base model and a fine-tuned one, its file layout, and how it is applied.

    delta.safetensors, for each tensor NAME of the base model that changed, by its name in the Hugging Face checkpoint:
        NAME.gaps      [bytes] uint8   k sorted flat indices: the first, then each less the one before, as LEB128 numbers
        NAME.values    [k]             new values
        NAME.base      [k]             base values; may be left out
    metadata: digest of the base model, its name and commit if it is from the hub, shape and dtypes of every tensor,
              sha256 of the contents

    apply: t[indices] = values, where t[indices] was base          undo: t[indices] = base, where t[indices] was values

Both are bit-exact. If a tensor does not hold the expected values, an error is raised before anything is written. A bf16 model
takes about 5 bytes per changed weight, 3 without base values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liftdist import __version__
from liftdist.errors import UserError

if TYPE_CHECKING:  # imports transformers
    from liftdist.deltas.adapter import Adapters

ABOUT = "liftdist.json"  # file of an exported model that holds Delta.about
ORIGIN = ("base_model", "base_commit")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """What changed in one tensor."""

    shape: tuple[int, ...]
    stored: torch.dtype  # dtype in the base model's file
    indices: Tensor  # [k] int64, flat, sorted
    values: Tensor  # [k], in the dtype that represents both base and trained values exactly
    base: Tensor | None  # [k], the base values in the same dtype

    def rows(self, begin: int, end: int) -> Change:
        """The part in rows ``[begin, end)`` of the tensor ``[..., n]`` seen as ``[all, n]``, with indices into them."""
        row_shape = self.shape[1:] and self.shape[-1:]
        width = int(torch.Size(row_shape).numel())
        low, high = torch.searchsorted(self.indices, torch.tensor([begin * width, end * width])).tolist()
        part = slice(low, high)
        base = None if self.base is None else self.base[part]
        return Change(
            (end - begin, *row_shape), self.stored, self.indices[part] - begin * width, self.values[part], base
        )

    def to(self, dtype: torch.dtype) -> Change:
        """The change for a model that was loaded in another dtype."""
        base = None if self.base is None else self.base.to(dtype)
        return Change(self.shape, dtype, self.indices, self.values.to(dtype), base)


@dataclass(frozen=True)
class Delta:
    """Changes of a base model, read one tensor at a time."""

    location: Path  # the file or folder that it was read from
    base_digest: str  # digest of the base model
    names: list[str]
    get: Callable[[str], Change]
    origin: Mapping[str, str] = field(default_factory=dict)  # base_model and base_commit, if known: its name on the hub
    whole: Callable[[str, Tensor], Tensor] | None = (
        None  # the new tensor from the base's, where all of its weights may change
    )
    adapters: Adapters | None = None  # that, merged, are what changed

    @cached_property
    def known(self) -> frozenset[str]:
        """:attr:`names`, to look one up."""
        return frozenset(self.names)

    def about(self) -> dict[str, str]:
        """What a result says of where it comes from: the base model, its digest, and the version of liftdist."""
        return {**self.origin, "base_digest": self.base_digest, "liftdist": __version__}


def changed(delta: Delta) -> Iterator[tuple[str, Change]]:
    """The tensors that differ from the base. Raises ``UserError`` for a value that is not finite."""
    for name in delta.names:
        change = delta.get(name)
        if change.indices.numel():
            if not is_finite(change.values):
                raise UserError(f"{delta.location}: {name} holds a value that is not finite")
            yield name, change


def is_finite(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    return bool((values.float() if values.element_size() == 1 else values).isfinite().all())


def check_fits(name: str, indices: Tensor, size: int) -> None:
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= size):
        raise ValueError(f"{name}: an index is out of range: {int(indices[-1])}, of {size} weights")


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, to compare bits: NaN equals itself, -0.0 does not equal 0.0."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def edit(name: str, tensor: Tensor, undo: Change | None, apply: Change | None) -> Tensor:
    """A new tensor: ``tensor`` with ``undo`` undone and ``apply`` applied. Raises ``UserError`` for unexpected values."""
    for change in (undo, apply):
        if change is not None and tuple(tensor.shape) != change.shape:
            raise UserError(f"{name} is {list(tensor.shape)}, the delta is for {list(change.shape)}")
        if change is not None and change.base is None and change is undo:
            raise UserError(f"{name}: the delta holds no base values: it cannot be undone")
    if undo is not None and undo.base is not None:
        tensor = _replace(name, tensor.to(undo.values.dtype), undo.indices, undo.values, undo.base, "new values").to(
            undo.stored
        )
    if apply is not None:
        tensor = _replace(name, tensor.to(apply.values.dtype), apply.indices, apply.base, apply.values, "base values")
    return tensor


def _replace(name: str, tensor: Tensor, indices: Tensor, old: Tensor | None, new: Tensor, what: str) -> Tensor:
    flat = tensor.flatten().clone()
    indices = indices.to(flat.device)
    if old is not None and not torch.equal(bits(flat[indices]), bits(old.to(flat.device))):
        raise UserError(f"{name} does not hold the {what} of the delta")
    flat[indices] = new.to(flat.device)
    return flat.view(tensor.shape)


def by_name(name: str, delta: Delta | None) -> Change | None:
    """The change of a tensor, or None."""
    return delta.get(name) if delta is not None and name in delta.known else None


def check_same_base(apply: Delta | None, undo: Delta | None) -> None:
    """Raises ``UserError`` unless two deltas can be swapped."""
    if apply is not None and undo is not None and apply.base_digest != undo.base_digest:
        raise UserError(f"{apply.location} and {undo.location} are for different base models")
