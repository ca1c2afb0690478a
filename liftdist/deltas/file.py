"""Delta files: written atomically, validated completely when read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.deltas.codec import decode, encode
from liftdist.deltas.delta import ORIGIN, Change, Delta, changed, check_fits, is_finite
from liftdist.errors import UserError
from liftdist.safetensors_io import DTYPES, TensorFile

FORMAT = "liftdist-delta-1"
PATCH_FORMAT = "sparse-patch"


def read(path: Path) -> Delta:
    """The delta in a file, validated completely.

    Raises:
        UserError: the file is absent, truncated, damaged, or not a delta; an index out of range; a value that is not finite.
    """
    try:
        file = TensorFile(path)
        metadata = file.metadata
        if (kind := metadata.get("format")) != FORMAT:
            kind = "a sparse patch" if kind == PATCH_FORMAT else "another kind of safetensors file"
            raise ValueError(f"is {kind}, not a delta that this version reads")
        tensors = json.loads(metadata["tensors"])
        if _contents_digest(file) != metadata["sha256"]:
            raise ValueError("its contents do not match the sha256 in its metadata")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or not a delta: {error}") from None

    def get(name: str) -> Change:
        about = tensors[name]
        values = file.read(f"{name}.values")
        base = file.read(f"{name}.base") if f"{name}.base" in file.entries else None
        indices = decode(file.read(f"{name}.gaps"), about["count"])
        change = Change(tuple(about["shape"]), DTYPES[about["stored"]], indices, values, base)
        check_fits(name, indices, int(torch.Size(change.shape).numel()))
        for part in (values, base):
            if part is not None and part.shape != indices.shape:
                raise ValueError(f"{name}: has {part.numel()} values for {indices.numel()} indices")
        if not is_finite(values):
            raise ValueError(f"{name}: holds a value that is not finite")
        return change

    delta = Delta(path, metadata["base"], list(tensors), get, {k: metadata[k] for k in ORIGIN if k in metadata})
    for name in delta.names:
        try:
            get(name)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: {error}") from None
    return delta


def write(delta: Delta, path: Path, with_base: bool = True) -> None:
    """Write a delta file atomically.

    Args:
        with_base: include the base values, without which a delta cannot be undone.

    Raises:
        UserError: a value is not finite, or ``path`` exists or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, change in changed(delta):
        tensors[f"{name}.gaps"], tensors[f"{name}.values"] = encode(change.indices), change.values
        if with_base and change.base is not None:
            tensors[f"{name}.base"] = change.base
        stored = safetensors_io.dtype_name(change.stored)
        about[name] = {"shape": list(change.shape), "stored": stored, "count": change.indices.numel()}
    metadata = {
        **delta.about(),
        "format": FORMAT,
        "base": delta.base_digest,
        "tensors": json.dumps(about),
        "sha256": safetensors_io.digest_of(sorted(tensors.items())),
    }
    save(tensors, path, metadata)


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises ``UserError`` if it exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path}: exists; remove it or give another path")
    try:
        with files.written_beside(path) as temporary:
            safetensors_io.save(tensors, temporary, metadata)
            files.sync_file(temporary)
            temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _contents_digest(file: TensorFile) -> str:
    return safetensors_io.digest_of((name, file.read(name)) for name in sorted(file.entries))
