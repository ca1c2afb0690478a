"""Versions on a disk that SGLang's ``/pull_weights`` applies to a checkpoint of its own, as slime and miles publish them.

    FOLDER/weight_v000001/model-00000-of-00001.safetensors   NAME [bytes] uint8, zstd of what changes in the bytes of tensor NAME:
                                                             u32 count | count u32 byte positions | count bytes, little-endian
                                                             metadata: NAME -> xxh3-128 of the tensor's bytes after it
                          liftdist.json                      of which base model, and by what it was made
                          model.safetensors.index.json       metadata: version, base_version, delta_encoding "overwrite",
                                                             compression_format "zstd", checksum_format "xxh3-128"

Version 0 is the base model, and each version follows the one before. The layout is that of slime (docs/en/advanced/
delta-weight-sync.md) and of sgl-project/sglang#30366.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.deltas import delta as deltas
from liftdist.deltas.delta import Change, Delta
from liftdist.errors import UserError
from liftdist.models import check
from liftdist.models.weights import ModelFolder

WEIGHTS = "model-00000-of-00001.safetensors"
_NAME = re.compile(r"weight_v(\d{6,})")


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder of one version, from the base model to the fine-tuned one.

    Raises:
        UserError: a value is not finite, a tensor cannot be written in this layout, or ``target`` exists or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target}: exists; remove it or give another path")
    with files.disk_errors(target), files.new_folder(target) as folder:
        path_of(folder, 1).mkdir()
        _write_version(path_of(folder, 1), 1, ModelFolder(base_folder), delta, delta)


def add(folder: Path, base: ModelFolder, delta: Delta, moved: Delta) -> int:
    """Publish the next version in a folder, whole or not at all, and return its number.

    Args:
        delta: all that differs from the base model afterwards.
        moved: what differs from the version before, at least.

    Raises:
        UserError: as :func:`write`.
    """
    number = newest(folder) + 1
    with files.disk_errors(folder), files.new_folder(path_of(folder, number)) as temporary:
        _write_version(temporary, number, base, delta, moved)
    return number


def check_base(base: ModelFolder) -> None:
    """Raises ``UserError`` if the base model's files do not hold the weights whose bytes a version changes."""
    if base.quantised:
        raise UserError(
            f"{base.folder}: holds quantised weights, and the format sglang changes the bytes of the base model's own files; "
            "use hf"
        )


def newest(folder: Path) -> int:
    """The number of the newest version, 0 for none."""
    return max((int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))), default=0)


def path_of(folder: Path, number: int) -> Path:
    """The folder of a version."""
    return folder / f"weight_v{number:06d}"


def _write_version(folder: Path, number: int, base: ModelFolder, delta: Delta, moved: Delta) -> None:
    try:
        import xxhash
        import zstandard
    except ImportError:
        raise UserError("the format sglang needs the library zstandard: pip install 'liftdist[sglang]'") from None
    check_base(base)
    compressor, checksums = zstandard.ZstdCompressor(level=1), {}
    with safetensors_io.Spool(folder) as tensors:
        for name, change in deltas.changed(moved):
            tensor, whole = base.read(name), delta.get(name)
            assert isinstance(whole, Change)
            _check(name, tensor, change)
            flat = tensor.flatten()
            deltas.bits(flat)[whole.indices] = deltas.bits(whole.values)
            checksums[name] = xxhash.xxh3_128(safetensors_io.bytes_of(flat)).hexdigest()
            packed = compressor.compress(_packed(change))
            tensors.add(name, torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        safetensors_io.save(tensors, folder / WEIGHTS, checksums)
    index = {
        "metadata": {
            "version": f"{number:06d}",
            "base_version": f"{number - 1:06d}",
            "delta_encoding": "overwrite",
            "compression_format": "zstd",
            "checksum_format": "xxh3-128",
        },
        "weight_map": dict.fromkeys(checksums, WEIGHTS),
    }
    (folder / check.INDEX).write_text(json.dumps(index, indent=1) + "\n")
    delta.write_about(folder)


def _packed(change: Change) -> bytes:
    size = change.values.element_size()
    positions = (change.indices[:, None] * size + torch.arange(size)).flatten().numpy().astype("<u4")
    count = np.array([len(positions)], dtype="<u4")
    return count.tobytes() + positions.tobytes() + safetensors_io.bytes_of(change.values)


def _check(name: str, tensor: Tensor, change: Change) -> None:
    if change.values.dtype != tensor.dtype:
        raise UserError(
            f"{name}: the run trained values of {change.values.dtype}, and the format sglang keeps the base model's "
            f"{tensor.dtype}; use --format hf"
        )
    if tensor.numel() * tensor.element_size() >= 2**32:
        raise UserError(f"{name}: has 4 GiB or more, and positions in the format sglang have 32 bits; use --format hf")
