"""The difference that fine-tuning made, as one small file, and what can be done with it.

    delta.safetensors, for each tensor NAME of the base model that changed, by its name in the Hugging Face checkpoint:
        NAME.gaps      [bytes] uint8   k sorted flat indices: the first, then each less the one before, as LEB128 numbers
        NAME.values    [k]             new values
        NAME.base      [k]             base values; may be left out
    metadata: digest of the base model, shape and dtypes of every tensor, sha256 of the contents

    apply: t[indices] = values, where t[indices] was base          undo: t[indices] = base, where t[indices] was values

Both are exact to the bit, and refused, before anything is written, where the tensors are not what they must be. A bf16 model
costs about 5 bytes a changed weight, and 3 without base values.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from liftdist import files
from liftdist.distributed.mesh import local_tensor, rows_of, together
from liftdist.models import weights
from liftdist.models.weights import DTYPES, ModelFolder
from liftdist.runs.checkpoint import Step
from liftdist.schema import UserError

FORMAT = "liftdist-delta-1"
PATCH_FORMAT = "sparse-patch"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """What changed in one tensor."""

    shape: tuple[int, ...]
    stored: torch.dtype  # of the base model's file
    indices: Tensor  # [k] int64, flat, sorted
    values: Tensor  # [k], of the dtype that holds both the base's and the trained values
    base: Tensor | None  # [k] likewise

    def rows(self, begin: int, end: int) -> Change:
        """The part in rows ``[begin, end)``, with indices into them."""
        width = int(torch.Size(self.shape[1:]).numel())
        low, high = torch.searchsorted(self.indices, torch.tensor([begin * width, end * width])).tolist()
        part = slice(low, high)
        base = None if self.base is None else self.base[part]
        return Change(
            (end - begin, *self.shape[1:]), self.stored, self.indices[part] - begin * width, self.values[part], base
        )

    def to(self, dtype: torch.dtype) -> Change:
        """The same for a model that was loaded in another dtype."""
        base = None if self.base is None else self.base.to(dtype)
        return Change(self.shape, dtype, self.indices, self.values.to(dtype), base)


@dataclass(frozen=True)
class Delta:
    """Changes of a base model, read one tensor at a time."""

    origin: Path
    base: str  # digest of the base model
    names: list[str]
    get: Callable[[str], Change]


# ---------------------------------------------------------------------------------------------------------------------
# Where deltas come from.


def of_run(step: Step, base: Path) -> Delta:
    """What a run has changed by a checkpoint.

    Raises:
        UserError: ``base`` does not hold the parameters.
    """
    stored_files = ModelFolder(base)
    names = {}
    for name in step.manifest["parameters"]:
        stored = name if name in stored_files.file_of else name.partition(".")[2]  # without the base model's prefix
        if stored not in stored_files.file_of:
            raise UserError(f"{base}: has no {name}, which the run trained")
        names[stored] = name

    def get(stored: str) -> Change:
        try:
            indices, values = step.touched(names[stored])
        except FileNotFoundError:
            raise UserError(f"{step.folder}: was removed meanwhile; a file named keep in it keeps it") from None
        tensor = stored_files.read(stored)
        dtype = torch.promote_types(tensor.dtype, values.dtype)
        _check_fits(stored, indices, tensor.numel())
        before, after = tensor.flatten()[indices].to(dtype), values.to(dtype)
        changed = _bits(before) != _bits(after)
        return Change(tuple(tensor.shape), tensor.dtype, indices[changed], after[changed], before[changed])

    return Delta(step.folder, step.manifest["base"], list(names), get)


def between(before: Path, after: Path, base: str) -> Delta:
    """What changed between two folders of one architecture; ``base`` is the digest of the first.

    Raises:
        UserError: they do not hold the same tensors.
    """
    old, new = ModelFolder(before), ModelFolder(after)
    if missing := sorted(set(old.file_of) ^ set(new.file_of)):
        folder = after if missing[0] in old.file_of else before
        raise UserError(f"{folder}: has no {missing[0]}, the other folder does")
    for name in old.file_of:
        if old.info(name)["shape"] != new.info(name)["shape"]:
            raise UserError(f"{name} is {old.info(name)['shape']} in {before}, {new.info(name)['shape']} in {after}")

    def get(name: str) -> Change:
        first, second = old.read(name), new.read(name)
        dtype = torch.promote_types(first.dtype, second.dtype)
        flat, other = first.flatten().to(dtype), second.flatten().to(dtype)
        indices = (_bits(flat) != _bits(other)).nonzero().squeeze(1)
        return Change(tuple(first.shape), first.dtype, indices, other[indices], flat[indices])

    return Delta(after, base, sorted(old.file_of), get)


def read(path: Path) -> Delta:
    """The delta in a file, all of it checked.

    Raises:
        UserError: the file is absent, cut short, damaged, or no delta; an index out of range; a value that is not finite.
    """
    try:
        entries = weights.header(path)
        metadata = entries.get("__metadata__", {})
        if (kind := metadata.get("format")) != FORMAT:
            kind = "a sparse patch" if kind == PATCH_FORMAT else "another kind of safetensors file"
            raise ValueError(f"is {kind}, not a delta that this version reads")
        tensors = json.loads(metadata["tensors"])
        if _contents_digest(path) != metadata["sha256"]:
            raise ValueError("its contents do not have the hash they were written with")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except struct.error:
        raise UserError(f"{path}: is empty or cut short") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path}: damaged, or no delta: {error}") from None

    def get(name: str) -> Change:
        about = tensors[name]
        with safe_open(path, framework="pt") as file:
            kept = set(file.keys())
            gaps, values = file.get_tensor(f"{name}.gaps"), file.get_tensor(f"{name}.values")
            base = file.get_tensor(f"{name}.base") if f"{name}.base" in kept else None
        indices = _from_gaps(gaps, about["count"])
        change = Change(tuple(about["shape"]), DTYPES[about["stored"]], indices, values, base)
        _check_fits(name, indices, int(torch.Size(change.shape).numel()))
        for part in (values, base):
            if part is not None and part.shape != indices.shape:
                raise ValueError(f"{name}: has {part.numel()} values for {indices.numel()} indices")
        if not _is_finite(values):
            raise ValueError(f"{name}: holds a value that is not finite")
        return change

    delta = Delta(path, metadata["base"], list(tensors), get)
    for name in delta.names:
        try:
            get(name)
        except (ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: {error}") from None
    return delta


def write(delta: Delta, path: Path, with_base: bool = True) -> None:
    """Write a delta, whole or not at all.

    Raises:
        UserError: a value is not finite.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, change in changed(delta):
        tensors[f"{name}.gaps"], tensors[f"{name}.values"] = _to_gaps(change.indices), change.values
        if with_base and change.base is not None:
            tensors[f"{name}.base"] = change.base
        stored = weights.dtype_name(change.stored)
        about[name] = {"shape": list(change.shape), "stored": stored, "count": change.indices.numel()}
    metadata = {
        "format": FORMAT,
        "base": delta.base,
        "tensors": json.dumps(about),
        "sha256": weights.digest_of(sorted(tensors.items())),
    }
    save(tensors, path, metadata)


def changed(delta: Delta) -> Iterator[tuple[str, Change]]:
    """The tensors that did change. Raises ``UserError`` for a value that is not finite."""
    for name in delta.names:
        change = delta.get(name)
        if change.indices.numel():
            if not _is_finite(change.values):
                raise UserError(f"{delta.origin}: {name} holds a value that is not finite")
            yield name, change


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    if path.exists():
        raise UserError(f"{path}: exists")
    try:
        with files.written_beside(path) as temporary:
            save_file(tensors, temporary, metadata)
            temporary.chmod(files.mode(0o666))
            files.sync_file(temporary)
            temporary.rename(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from None


def _contents_digest(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return weights.digest_of((name, file.get_tensor(name)) for name in sorted(file.keys()))


def _to_gaps(indices: Tensor) -> Tensor:
    """LEB128: seven bits a byte, the lowest first, the eighth set in all bytes of a number but the last."""
    gaps = np.diff(indices.numpy(), prepend=0).astype(np.uint64)
    lengths = np.ones(len(gaps), dtype=np.int64)
    for bits in range(7, 63, 7):
        lengths += gaps >= (1 << bits)
    ends = np.cumsum(lengths)
    coded = np.zeros(-(-int(ends[-1]) // 8) * 8 if len(ends) else 0, dtype=np.uint8)  # aligned for what follows
    for place in range(int(lengths.max(initial=0))):
        chosen = lengths > place
        more = (lengths[chosen] > place + 1).astype(np.uint8) << 7
        digit = ((gaps[chosen] >> np.uint64(7 * place)) & np.uint64(127)).astype(np.uint8)
        coded[ends[chosen] - lengths[chosen] + place] = digit | more
    return torch.from_numpy(coded)


def _from_gaps(coded: Tensor, count: int) -> Tensor:
    """``[count]`` int64. Raises ``ValueError`` if there are not as many, or they do not ascend."""
    raw = coded.numpy()
    ends = np.flatnonzero(raw < 128)[:count] + 1
    if len(ends) != count or len(raw) - (int(ends[-1]) if count else 0) >= 8:
        raise ValueError("the number of indices is not what it must be")
    starts = np.concatenate([[0], ends[:-1]])
    gaps = np.zeros(count, dtype=np.int64)
    lengths = ends - starts
    if lengths.max(initial=0) > 9:
        raise ValueError("an index is out of range")
    for place in range(int(lengths.max(initial=0))):
        chosen = lengths > place
        gaps[chosen] |= (raw[starts[chosen] + place].astype(np.int64) & 127) << (7 * place)
    indices = np.cumsum(gaps)
    if count and (indices[0] < 0 or (count > 1 and (indices[1:] <= indices[:-1]).any())):
        raise ValueError("indices do not ascend")
    return torch.from_numpy(indices)


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    return bool((values.float() if values.element_size() == 1 else values).isfinite().all())


def _check_fits(name: str, indices: Tensor, size: int) -> None:
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= size):
        raise ValueError(f"{name}: an index is out of range: {int(indices[-1])}, of {size} weights")


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: equal when the bits are, which NaN and -0.0 make a difference."""
    return tensor.contiguous().view(_BITS[tensor.element_size()])


# ---------------------------------------------------------------------------------------------------------------------
# Apply, undo, swap.


def edit(name: str, tensor: Tensor, undo: Change | None, apply: Change | None) -> Tensor:
    """``tensor`` without one change and with another, as a new tensor. Raises ``UserError`` if it is not what they start from."""
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
    if old is not None and not torch.equal(_bits(flat[indices]), _bits(old.to(flat.device))):
        raise UserError(f"{name} does not hold the {what} of the delta")
    flat[indices] = new.to(flat.device)
    return flat.view(tensor.shape)


def by_name(name: str, delta: Delta | None) -> Change | None:
    """The change of a tensor, if there is one."""
    return delta.get(name) if delta is not None and name in delta.names else None


def change_module(module: nn.Module, apply: Delta | None = None, undo: Delta | None = None) -> None:
    """Apply a delta to a model in memory, undo one, or swap one for another; the model may be sharded by rows.

    Everything is checked before anything is written.

    Raises:
        UserError: the model does not hold a tensor, or not with the shape and weights that the delta starts from.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward some parameters may be gathered copies
    params = dict(module.named_parameters())
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    names = {name: name if name in params else prefix + name for d in (apply, undo) if d for name in d.names}

    def edited(name: str) -> tuple[Tensor, Tensor]:
        if names[name] not in params:
            raise UserError(f"the model has no {name}")
        param = params[names[name]]
        local, rows = local_tensor(param), rows_of(param)
        changes = []
        for change in (by_name(name, undo), by_name(name, apply)):
            if change is not None and change.shape != tuple(param.shape):
                raise UserError(f"{name} is {list(param.shape)}, the delta is for {list(change.shape)}")
            changes.append(None if change is None else change.rows(*rows).to(local.dtype))
        return local, edit(name, local, *changes)

    with torch.no_grad():
        with together():
            check_same_base(apply, undo)
            for name in names:
                edited(name)
        for name in names:
            local, result = edited(name)
            local.copy_(result)


def check_same_base(apply: Delta | None, undo: Delta | None) -> None:
    """Raises ``UserError`` unless two deltas can be swapped."""
    if apply is not None and undo is not None and apply.base != undo.base:
        raise UserError(f"{apply.origin} and {undo.origin} are for different base models")
