"""The sparse difference between a base model and a fine-tuned one, its file layout, and how it is applied.

    delta.safetensors, for each tensor NAME of the base model that changed, by its name in the Hugging Face checkpoint:
        NAME.gaps      [bytes] uint8   k sorted flat indices: the first, then each less the one before, as LEB128 numbers
        NAME.values    [k]             new values
        NAME.base      [k]             base values; may be left out
    metadata: digest of the base model, its name and commit if it is from the hub, how the delta was made, shape and dtypes of
              every tensor, sha256 of the contents

    apply: t[indices] = values, where t[indices] was base          undo: t[indices] = base, where t[indices] was values

Both are bit-exact. If a tensor does not hold the expected values, an error is raised before anything is written. A bf16 model
takes about 5 bytes per changed weight, 3 without base values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from liftdist import __version__
from liftdist.errors import UserError

if TYPE_CHECKING:
    from liftdist.deltas.adapter import Adapters  # imports transformers
    from liftdist.deltas.difference import Difference  # imports this

ABOUT = "liftdist.json"  # file of an exported model or adapter that holds Delta.about
ORIGIN = ("base_model", "base_commit")
AS_TRAINED = "as_trained"  # export format, and in Delta.made of such a model, which is on a rounded base
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """What changed in one tensor."""

    shape: tuple[int, ...]
    stored: torch.dtype  # dtype in the base model's file
    indices: Tensor  # [k] int64, flat, sorted
    values: Tensor  # [k], in the dtype that represents both base and trained values exactly
    base: Tensor | None  # [k], the base values in the same dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def undoable(self) -> bool:
        return self.base is not None

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
    get: Callable[[str], Change | Difference]  # differences of a compressed one, see liftdist.deltas.difference.on
    origin: Mapping[str, str] = field(default_factory=dict)  # base_model and base_commit, if known: its name on the hub
    whole: Callable[[str, Tensor], Tensor] | None = (
        None  # the new tensor from the base's, where all of its weights may change
    )
    adapters: Adapters | None = None  # that, merged, are what changed
    made: Mapping[str, Any] = field(default_factory=dict)  # how, if it is known: what JSON can hold
    sha256: str = ""  # of the contents of the file or checkpoint
    compressed: bool = (
        False  # whether the file holds differences alone; of what was made of it, ``made`` says that it once did
    )
    trusted: bool = False  # whether code that comes with the base model may be run: never by the word of a file

    @cached_property
    def known(self) -> frozenset[str]:
        """:attr:`names`, to look one up."""
        return frozenset(self.names)

    def about(self) -> dict[str, Any]:
        """What a result says of where it comes from: the base model, its digest, how it was made, and the version of liftdist."""
        made = {"made": dict(self.made)} if self.made else {}
        return {**self.origin, "base_digest": self.base_digest, **made, "liftdist": __version__}

    def write_about(self, folder: Path) -> None:
        """Write :meth:`about` into a folder of a result."""
        (folder / ABOUT).write_text(json.dumps(self.about(), indent=2) + "\n")


def changed(delta: Delta) -> Iterator[tuple[str, Change]]:
    """The tensors that differ from the base. Raises ``UserError`` for a value that is not finite, or differences alone."""
    for name in delta.names:
        change = delta.get(name)
        if not isinstance(change, Change):
            raise no_values(delta)
        if change.indices.numel():
            if not is_finite(change.values):
                raise UserError(f"{delta.location}: {name} holds a value that is not finite")
            yield name, change


def no_values(delta: Delta) -> UserError:
    """Says that a compressed delta is used where values are needed."""
    return UserError(f"{delta.location}: is compressed, so that its values depend on the base model; give --base")


def is_finite(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    return bool((values.float() if values.element_size() == 1 else values).isfinite().all())


def is_plain(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are the weights themselves: floating-point ones of 8 bits have scales in other tensors."""
    return dtype.is_floating_point and dtype.itemsize > 1


def loses(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether weights are rounded in a dtype of fewer digits: bfloat16 undoes most of what a run has changed in float32.

    Digits alone count: who takes float16 for bfloat16 loses the smallest weights, of the base model as well.
    """
    if not (is_plain(values.dtype) and is_plain(dtype)) or torch.finfo(dtype).eps <= torch.finfo(values.dtype).eps:
        return False
    return not torch.equal(values.to(dtype).to(values.dtype), values)


def check_fits(name: str, indices: Tensor, size: int) -> None:
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= size):
        raise ValueError(f"{name}: an index is out of range: {int(indices[-1])}, of {size} weights")


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, to compare bits: NaN equals itself, -0.0 does not equal 0.0."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def edit(
    name: str,
    tensor: Tensor,
    undo: Sequence[Change | Difference],
    apply: Sequence[Change | Difference],
    in_place: bool = False,
) -> Tensor:
    """``tensor`` with all of ``undo`` undone, then all of ``apply`` applied; those of either are disjoint.

    Args:
        in_place: whether ``tensor`` may be written to; else the result is a new one.

    Raises ``UserError`` for unexpected values."""
    for change in (*undo, *apply):
        if tuple(tensor.shape) != change.shape:
            raise UserError(f"{name} is {list(tensor.shape)}, the delta is for {list(change.shape)}")
    for change in undo:
        if not isinstance(change, Change):
            change = change.undone(tensor.flatten()[change.indices])
        if change.base is None:
            raise UserError(f"{name}: the delta holds no base values: it cannot be undone")
        tensor = _replace(name, tensor, change.indices, change.values, change.base, "new values of the delta", in_place)
        in_place = True
    if undo:
        tensor = tensor.to(
            min((change.stored for change in undo), key=lambda dtype: dtype.itemsize)
        )  # of the first of them
    for change in apply:
        if not isinstance(change, Change):
            change = change.applied(tensor.flatten()[change.indices])
            if not is_finite(change.values):
                raise UserError(f"{name}: becomes a value that is not finite")
        what = "base values of the delta; if another one is applied there, `liftdist merge` makes one of both"
        tensor = _replace(name, tensor, change.indices, change.base, change.values, what, in_place)
        in_place = True
    return tensor


def _replace(
    name: str, tensor: Tensor, indices: Tensor, old: Tensor | None, new: Tensor, what: str, in_place: bool
) -> Tensor:
    flat = tensor.reshape(-1)
    dtype = torch.promote_types(tensor.dtype, new.dtype)
    indices = indices.to(flat.device)
    if old is not None and not torch.equal(bits(flat[indices].to(dtype)), bits(old.to(flat.device, dtype))):
        raise UserError(f"{name} does not hold the {what}")
    flat = flat.to(dtype, copy=not in_place)
    flat.view(_BITS[flat.element_size()])[indices] = bits(new.to(flat))  # not all dtypes can be written at indices
    return flat.view(tensor.shape)


def by_name(name: str, delta: Delta | None) -> Change | Difference | None:
    """The change of a tensor, or None."""
    return delta.get(name) if delta is not None and name in delta.known else None


def changes(name: str, *deltas: Delta | None) -> list[Change | Difference]:
    """The changes of a tensor by those of the deltas that change it."""
    return [change for delta in deltas if (change := by_name(name, delta)) is not None]


def check_disjoint(delta: Delta, others: Iterable[Delta]) -> None:
    """Raises ``UserError`` if one of the others changes a weight that ``delta`` changes, too: then the order would matter."""
    for other in others:
        for name in sorted(delta.known & other.known):
            if torch.isin(delta.get(name).indices, other.get(name).indices, assume_unique=True).any():
                raise UserError(
                    f"{delta.location} and {other.location} change the same weights of {name}: a model holds both only as the "
                    "one that `liftdist merge` makes of them"
                )


def check_same_base(*deltas: Delta | None) -> None:
    """Raises ``UserError`` unless all deltas are of one base model."""
    given = [delta for delta in deltas if delta is not None]
    for delta in given[1:]:
        if delta.base_digest != given[0].base_digest:
            raise UserError(f"{given[0].location} and {delta.location} are for different base models")
