"""The file of a compressed delta: a change is kept as a :class:`liftdist.deltas.difference.Difference`.

    for each tensor NAME of the base model that changed, all deflated:
        NAME.gaps      k sorted flat indices, as in a delta          NAME.steps   exact: k whole numbers
        NAME.signs     lossy: k bits, 1 for a positive step          NAME.sizes   lossy, of more than 1 bit: |step| / scale - 1
        NAME.undo      lossy: k corrections
    metadata: what a delta has, and by tensor the dtype of the new values, and of a lossy one the scale

Whole numbers are small and of both signs. They are written as 2 n, or -2 n - 1 where negative, all lowest bytes first, then the
next: of the planes of higher bytes little is left. DEFLATE with run lengths alone (``Z_RLE``) makes them smallest of what was
tried, see ``bench/LOG.md``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftdist import safetensors_io
from liftdist.deltas.codec import decode, encode
from liftdist.deltas.delta import check_fits
from liftdist.deltas.difference import Difference
from liftdist.safetensors_io import DTYPES, TensorFile

FORMAT = "liftdist-compressed-delta-1"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(name: str, found: Difference, scale: float | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a difference in the file, and what the metadata says of it.

    Args:
        scale: of a lossy one: the steps are whole multiples of it, none of them 0.
    """
    about = {
        "shape": list(found.shape),
        "stored": safetensors_io.dtype_name(found.stored),
        "dtype": safetensors_io.dtype_name(found.dtype),
        "count": found.indices.numel(),
    }
    parts = {"gaps": _deflated(encode(found.indices).numpy().tobytes())}
    if found.corrections is None:
        parts["steps"] = _deflated(_planes(found.steps))
    else:
        assert scale is not None
        sizes = (found.steps.abs() / scale).round().to(torch.uint8) - 1
        about["scale"] = scale
        parts["signs"] = _deflated(np.packbits(found.steps.numpy() > 0).tobytes())
        parts["undo"] = _deflated(_planes(found.corrections))
        if sizes.any():
            parts["sizes"] = _deflated(sizes.numpy().tobytes())
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}, about


def size(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Bytes that what :func:`pack` returns takes in a file, at most: its place in the header is some 400 of them."""
    entries = sum(len(json.dumps(part)) + 90 + tensor.nbytes for part, tensor in tensors.items())
    return entries + len(json.dumps(json.dumps({name.rpartition(".")[0]: about for name in tensors})))


def multiples(sizes: Tensor, signs: Tensor, scale: float) -> Tensor:
    """``[k]`` float32: the steps of ``sizes`` whole multiples of a scale, with ``signs``."""
    return sizes.float() * torch.tensor(scale, dtype=torch.float32) * signs.float()


def reader(file: TensorFile, tensors: Mapping[str, Any]) -> Callable[[str], Difference]:
    """What reads a tensor's difference. It raises ``ValueError`` or ``KeyError`` for one that is damaged."""

    def get(name: str) -> Difference:
        about = tensors[name]
        count, stored, dtype = about["count"], DTYPES[about["stored"]], DTYPES[about["dtype"]]
        shape = tuple(about["shape"])

        def inflated(part: str, size: int | None) -> np.ndarray:
            decoder = zlib.decompressobj()
            try:
                data = decoder.decompress(
                    file.read(f"{name}.{part}").numpy().tobytes(), 10 * count + 8 if size is None else size + 1
                )
            except zlib.error as error:
                raise ValueError(f"{name}.{part}: {error}") from None
            if size is not None and len(data) != size:
                raise ValueError(f"{name}.{part}: is not for {count} weights")
            return np.frombuffer(bytearray(data), np.uint8)

        def integers(part: str, wide: torch.dtype) -> Tensor:
            return _numbers(inflated(part, count * wide.itemsize), wide)

        indices = decode(torch.from_numpy(inflated("gaps", None)), count)
        check_fits(name, indices, int(torch.Size(shape).numel()))
        if "scale" not in about:
            return Difference(shape, stored, indices, dtype, integers("steps", dtype))
        signs = np.unpackbits(inflated("signs", -(-count // 8)), count=count).astype(np.int8) * 2 - 1
        sizes = inflated("sizes", count) if f"{name}.sizes" in file.entries else np.zeros(count, np.uint8)
        steps = multiples(torch.from_numpy(sizes).int() + 1, torch.from_numpy(signs), float(about["scale"]))
        if not steps.isfinite().all():
            raise ValueError(f"{name}: holds a step that is not finite")
        return Difference(shape, stored, indices, dtype, steps, integers("undo", stored))

    return get


def _deflated(data: bytes) -> Tensor:
    """``[bytes]`` uint8, never empty."""
    coder = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return torch.frombuffer(bytearray(coder.compress(data) + coder.flush()), dtype=torch.uint8)


def _planes(numbers: Tensor) -> bytes:
    """Whole numbers as planes of bytes, the lowest first."""
    signed = numbers.numpy()
    width = signed.itemsize
    folded = ((signed << 1) ^ (signed >> (8 * width - 1))).view(f"<u{width}")
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, width).T).tobytes()


def _numbers(planes: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_planes`, as integers as wide as ``dtype``."""
    width = dtype.itemsize
    folded = np.ascontiguousarray(planes.reshape(width, -1).T).view(f"<u{width}").reshape(-1)
    signed = (folded >> 1).view(f"<i{width}") ^ -(folded & 1).view(f"<i{width}")
    return torch.from_numpy(signed).to(_INTEGERS[width])
