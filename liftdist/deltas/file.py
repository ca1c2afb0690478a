"""Delta files: written atomically, validated completely when read."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.deltas import compressed
from liftdist.deltas.codec import decode, encode
from liftdist.deltas.delta import ORIGIN, Change, Delta, changed, check_fits, is_finite
from liftdist.deltas.difference import Difference
from liftdist.errors import UserError
from liftdist.safetensors_io import DTYPES, TensorFile

FORMAT = "liftdist-delta-1"
PATCH_FORMAT = "sparse-patch"
NAME, PATCH_NAME = "delta.safetensors", "patch.safetensors"  # in a repository on the hub


def read(path: Path, at_once: bool = True) -> Delta:
    """The delta in a file, validated completely.

    Args:
        at_once: validate all tensors now, and not each when it is asked for: then its ``get`` raises what follows.

    Raises:
        UserError: the file is absent, truncated, damaged, or not a delta; an index out of range; a value that is not finite.
    """
    try:
        file = TensorFile(path)
        metadata = file.metadata
        if (kind := metadata.get("format")) not in (FORMAT, compressed.FORMAT):
            kind = "a sparse patch" if kind == PATCH_FORMAT else "another kind of safetensors file"
            raise ValueError(f"is {kind}, not a delta that this version reads")
        tensors, made = dict(json.loads(metadata["tensors"])), dict(json.loads(metadata.get("made", "{}")))
        base_digest = metadata["base"]
        if _contents_digest(file) != metadata["sha256"]:
            raise ValueError("its contents do not match the sha256 in its metadata")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or not a delta: {error}") from None

    def get_values(name: str) -> Change:
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

    is_compressed = metadata["format"] == compressed.FORMAT
    read_one = compressed.reader(file, tensors) if is_compressed else get_values

    @functools.lru_cache(maxsize=1)  # a tensor is asked for several times in a row: to be checked, undone, applied
    def get(name: str) -> Change | Difference:
        try:
            return read_one(name)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: damaged, or not a delta: {name}: {problem}") from None

    origin = {key: metadata[key] for key in ORIGIN if key in metadata}
    delta = Delta(
        path,
        base_digest,
        list(tensors),
        get,
        origin,
        made=made,
        sha256=metadata["sha256"],
        compressed=is_compressed,
    )
    if at_once:
        for name in delta.names:
            get(name)
    return delta


def write(delta: Delta, path: Path, with_base: bool = True) -> None:
    """Write a delta file atomically, one tensor in memory at a time.

    Args:
        with_base: include the base values, without which a delta cannot be undone.

    Raises:
        UserError: a value is not finite, or ``path`` exists or cannot be written.
    """
    about: dict[str, Any] = {}
    with files.disk_errors(path):
        spool = safetensors_io.Spool(path.parent)
    with spool as tensors:
        for name, change in changed(delta):
            parts = {"gaps": encode(change.indices), "values": change.values}
            if with_base and change.base is not None:
                parts["base"] = change.base
            with files.disk_errors(path):
                for part, tensor in parts.items():
                    tensors.add(f"{name}.{part}", tensor)
            stored = safetensors_io.dtype_name(change.stored)
            about[name] = {"shape": list(change.shape), "stored": stored, "count": change.indices.numel()}
        save(tensors, path, description(delta, FORMAT, about, tensors))


def description(delta: Delta, format: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a file of ``tensors`` says of itself; ``about`` says it of each tensor of the model."""
    sha256 = safetensors_io.digest_of((name, tensors[name]) for name in sorted(tensors))
    return {**delta.about(), "format": format, "base": delta.base_digest, "tensors": dict(about), "sha256": sha256}


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with ``metadata`` as JSON where it is no text. Raises ``UserError`` if the file exists
    or cannot be written."""
    if path.exists():
        raise UserError(f"{path}: exists; remove it or give another path")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with files.disk_errors(path), files.written_beside(path) as temporary:
        safetensors_io.save(tensors, temporary, texts)
        files.sync_file(temporary)
        temporary.rename(path)


def _contents_digest(file: TensorFile) -> str:
    return safetensors_io.digest_of((name, file.read(name)) for name in sorted(file.entries))
