"""Tensors in the safetensors format: written, read, names of dtypes, bytes, digests."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftdist.safetensors_header import data_begin, header

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by their safetensors names, in the order in which the library writes them


class Unexpected(ValueError):
    """A tensor is not what the header of a file says."""


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of tensors on the host, byte for byte as the library does.

    The library makes files that only their owner may read, whatever the umask and the folder say.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    about = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write(path, about, (tensors[name] for name in in_order(about)), metadata)


def in_order(about: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """The names of tensors in the order in which a file holds them."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    return sorted(about, key=lambda name: (ranks[about[name][0]], name))


def write(
    path: Path,
    about: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As :func:`save`, of tensors that come one after the other.

    Args:
        about: dtype and shape of each.
        tensors: in the order of :func:`in_order`.

    Raises:
        Unexpected: one is of another dtype or shape.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    names = in_order(about)
    for name in names:
        dtype, shape = about[name]
        begin, position = position, position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, position]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _naming(path):
        file = path.open("wb")
    try:
        with _naming(path):
            file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in zip(names, tensors, strict=True):
            if (tensor.dtype, list(tensor.shape)) != (about[name][0], list(about[name][1])):
                raise Unexpected(f"{name} is {tensor.dtype} {list(tensor.shape)}")
            with _naming(path):
                file.write(memory_of(tensor))
    finally:
        with _naming(path):
            file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an ``OSError`` name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None


class TensorFile:
    """A safetensors file that is open only during a read. Its header is read once, however many tensors are read: a checkpoint
    of a model with many experts has a hundred thousand.

    Args:
        entries: of the header, if it has been read.

    Raises:
        ValueError, OSError: as :func:`liftdist.safetensors_header.header`.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.entries = dict(header(path) if entries is None else entries)
        self.metadata: dict[str, str] = self.entries.pop("__metadata__", {})

    def read(self, name: str) -> Tensor:
        """A tensor in the dtype of the file. Raises ``KeyError`` if there is none, ``OSError`` if it cannot be read."""
        shape = self.entries[name]["shape"]
        return self.rows(name, 0, math.prod(shape[:-1] if len(shape) > 1 else shape)).view(shape)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """``[end - begin, n]``: rows of a tensor ``[..., n]`` seen as ``[all, n]``; of a vector its entries ``[end - begin]``."""
        info = self.entries[name]
        row_shape = info["shape"][-1:] if len(info["shape"]) > 1 else []
        rows = torch.empty(end - begin, *row_shape, dtype=DTYPES[info["dtype"]])
        if rows.numel():
            with self.path.open("rb", buffering=0) as file:
                offset = begin * math.prod(row_shape) * rows.element_size()
                file.seek(data_begin(file) + info["data_offsets"][0] + offset)
                _read_into(file, memory_of(rows))
        return rows

    def mapped(self, name: str) -> Tensor:
        """As :meth:`read`, not empty: memory holds what is read of it, and the system takes that back where it lacks memory."""
        info = self.entries[name]
        begin, end = info["data_offsets"]
        with self.path.open("rb") as file:
            found = np.memmap(file, np.uint8, "c", data_begin(file) + begin, (end - begin,))
        return torch.from_numpy(found).view(DTYPES[info["dtype"]]).view(info["shape"])


class Spool(Mapping[str, Tensor]):
    """Tensors, none of them empty, that wait in an unnamed file of ``folder`` until they are saved; memory holds none of them."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._entries: dict[str, tuple[int, torch.dtype, torch.Size]] = {}  # where each begins

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ``OSError`` if it cannot be written."""
        begin = self._file.seek(-(-self._file.seek(0, os.SEEK_END) // 8) * 8)  # aligned
        self._file.write(memory_of(tensor))
        self._file.flush()
        self._entries[name] = begin, tensor.dtype, tensor.shape

    def __getitem__(self, name: str) -> Tensor:
        begin, dtype, shape = self._entries[name]
        mapped = np.memmap(self._file, np.uint8, "c", begin, (shape.numel() * dtype.itemsize,))
        return torch.from_numpy(mapped).view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of what a full disk did not take
            self._file.close()


def _read_into(file: io.RawIOBase, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise OSError("the file ends too early")
        buffer = buffer[count:]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of tensors, in the given order."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """A copy of :func:`memory_of` a tensor."""
    return bytes(memory_of(tensor))


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, row-major; those of the tensor itself, which may be written, where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)
