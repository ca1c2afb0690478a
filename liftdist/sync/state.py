"""What a run has changed of its base model up to one version, and the difference between two versions.

The support of a tensor is every weight of it that a version so far has held: flat indices, sorted. It only grows, where a refresh
selects others. A state holds the support and its values; all other weights are the base model's. Differences are files:

    changes.safetensors, for each tensor NAME in which a bit differs from the version before:
        NAME.gaps      [bytes] uint8   the support, only if it has grown: coded as in a delta
        NAME.places    [bytes] uint8   places in the support of what follows, coded alike; left out if it is all of them
        NAME.values    [c]             new values, absolute
    metadata: format, and for each tensor its shape, dtype in the base model's file, sizes of its support and of its places

So a tensor whose support stays costs its changed values and about one byte for each, or all values without any index, whichever
is less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from liftdist import digests, safetensors_io
from liftdist.deltas.codec import decode, encode
from liftdist.deltas.delta import Change, bits, check_fits
from liftdist.safetensors_io import DTYPES, TensorFile

FORMAT = "liftdist-changes-1"


@dataclass(frozen=True)
class Support:
    """Which weights of a tensor a run has changed."""

    shape: tuple[int, ...]
    stored: torch.dtype  # in the base model's file
    indices: Tensor  # [k] int32, or int64 in a tensor of 2^31 weights or more; flat, sorted

    @classmethod
    def of(cls, shape: tuple[int, ...], stored: torch.dtype, indices: Tensor) -> Support:
        numel = torch.Size(shape).numel()
        return cls(shape, stored, indices.to(torch.int32 if numel < 2**31 else torch.int64))

    @cached_property
    def sha256(self) -> str:
        """Of shape and indices."""
        return safetensors_io.digest_of([(json.dumps(self.shape), self.indices.long())])

    def within(self, other: Support) -> Tensor | None:
        """``[k]`` the places of these indices among those of ``other``; None if one is not there."""
        if self is other:
            return torch.arange(self.indices.numel())
        if self.shape != other.shape or self.indices.numel() > other.indices.numel():
            return None
        places = torch.searchsorted(other.indices, self.indices)
        places.clamp_(max=max(other.indices.numel() - 1, 0))
        return places if torch.equal(other.indices[places], self.indices) else None


@dataclass(frozen=True)
class Weights:
    """The values of a support."""

    support: Support
    values: Tensor  # [k], in the dtype that represents both base and trained values exactly

    def change(self, places: Tensor | None = None) -> Change:
        """These values, or those at some places, as absolute values by flat index."""
        indices, values = self.support.indices, self.values
        if places is not None:
            indices, values = indices[places], values[places]
        return Change(self.support.shape, self.support.stored, indices.long(), values, None)


State = Mapping[str, Weights]  # by the tensor's name in the base model's files


def digest(state: State) -> str:
    """sha256 over name, shape, indices and values of every tensor, 64 hexadecimal digits."""
    return digests.of_parts(
        [
            [
                name,
                held.support.sha256,
                str(held.values.dtype),
                hashlib.sha256(safetensors_io.memory_of(held.values)).hexdigest(),
            ]
            for name, held in sorted(state.items())
        ]
    )


def moved(before: Weights | None, after: Weights) -> Tensor:
    """``[c]`` sorted places in the support of ``after`` that were not in that of ``before``, or held other bits: all of them
    where the dtype is another.

    Raises ``ValueError`` if the support has lost a weight.
    """
    if before is None:
        return torch.arange(after.values.numel())
    if before.support is after.support and before.values.dtype == after.values.dtype:
        return (bits(before.values) != bits(after.values)).nonzero().squeeze(1)
    places = before.support.within(after.support)
    if places is None:
        raise ValueError("it is not what the version before was, and more")
    differs = torch.ones(after.values.numel(), dtype=torch.bool)
    if before.values.dtype == after.values.dtype:
        differs[places] = bits(before.values) != bits(after.values[places])
    return differs.nonzero().squeeze(1)


def grown(before: State, found: State, base: Callable[[str, Tensor], Tensor]) -> dict[str, Weights]:
    """``found`` with every weight that ``before`` held, and its ``Support`` where that is the same.

    A run that continues from an older checkpoint has not yet changed all that it once had: the rest holds base values again.

    Args:
        base: the base model's values ``[k]`` of a tensor at flat indices ``[k]`` int64.
    """
    result = {}
    for name in sorted(before.keys() | found.keys()):
        if name not in before:
            result[name] = found[name]
            continue
        old = before[name]
        empty = Weights(Support.of(old.support.shape, old.support.stored, torch.empty(0).int()), old.values[:0])
        new = found.get(name, empty)
        if torch.equal(old.support.indices, new.support.indices):
            result[name] = Weights(old.support, new.values)
            continue
        lost = old.support.indices[~torch.isin(old.support.indices, new.support.indices, assume_unique=True)]
        if lost.numel():
            indices = torch.cat([new.support.indices, lost])
            values = torch.cat([new.values, base(name, lost.long()).to(new.values.dtype)])
            order = indices.argsort()
            new = Weights(Support.of(new.support.shape, new.support.stored, indices[order]), values[order])
        result[name] = (
            Weights(old.support, new.values) if torch.equal(old.support.indices, new.support.indices) else new
        )
    return result


def write_changes(before: State, after: State, path: Path) -> None:
    """Write the difference between two states. Raises ``OSError``."""
    tensors: dict[str, Tensor] = {}
    about = {}
    for name, new in after.items():
        places = moved(before.get(name), new)
        if not places.numel():
            continue
        old = before.get(name)
        if old is None or old.support.indices.numel() < new.support.indices.numel():
            tensors[f"{name}.gaps"] = encode(new.support.indices)
        coded, size = encode(places), new.values.element_size()
        if coded.numel() + places.numel() * size < new.values.numel() * size:
            tensors[f"{name}.places"], tensors[f"{name}.values"] = coded, new.values[places]
        else:
            tensors[f"{name}.values"] = new.values
        stored = safetensors_io.dtype_name(new.support.stored)
        sizes = {"count": new.values.numel(), "changed": tensors[f"{name}.values"].numel()}
        about[name] = {"shape": list(new.support.shape), "stored": stored, **sizes}
    safetensors_io.save(tensors, path, {"format": FORMAT, "tensors": json.dumps(about)})


def read_changes(before: State, path: Path) -> dict[str, Weights]:
    """The state that the changes in a file make of ``before``, which stays as it is.

    Raises:
        ValueError, KeyError, OSError: the file is damaged, or is not one of changes to ``before``.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no changes that this version reads")
    after = dict(before)
    for name, about in json.loads(file.metadata["tensors"]).items():
        count, old = about["count"], before.get(name)
        values = file.read(f"{name}.values")
        if f"{name}.gaps" in file.entries:
            shape = tuple(about["shape"])
            indices = decode(file.read(f"{name}.gaps"), count)
            check_fits(name, indices, torch.Size(shape).numel())
            support = Support.of(shape, DTYPES[about["stored"]], indices)
        elif old is not None and old.values.numel() == count:
            support = old.support
        else:
            raise ValueError(f"{path}: changes {name} at indices that it does not hold")
        if f"{name}.places" in file.entries:
            values = _placed(name, old, support, decode(file.read(f"{name}.places"), about["changed"]), values)
        if values.numel() != count:
            raise ValueError(f"{path}: has {values.numel()} values of {name} for {count} indices")
        after[name] = Weights(support, values)
    return after


def _placed(name: str, old: Weights | None, support: Support, places: Tensor, values: Tensor) -> Tensor:
    """``[k]`` the old values of a support, with others at some places."""
    known = torch.zeros(support.indices.numel(), dtype=torch.bool)
    result = torch.empty(known.numel(), dtype=values.dtype)
    check_fits(name, places, known.numel())
    if places.shape != values.shape:
        raise ValueError(f"{name}: has {values.numel()} values for {places.numel()} places")
    if old is not None:
        kept = old.support.within(support)
        if kept is None or old.values.dtype != values.dtype:
            raise ValueError(f"{name}: it is not what the version before was, and more")
        result[kept], known[kept] = old.values, True
    result[places], known[places] = values, True
    if not known.all():
        raise ValueError(f"{name}: has no values for some of its indices")
    return result
