"""The weights of a Hugging Face folder: safetensors files, read by name and rows, and the digest that names them.

    model.safetensors, or model-0000x-of-0000n.safetensors and an index        [m, n] row-major, little-endian

No file is opened for longer than a read, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from liftdist import files, preflight
from liftdist.distributed.mesh import gather, together
from liftdist.schema import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by the names that safetensors gives them


class ModelFolder:
    """The safetensors files of a folder, opened one at a time, read by name and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        preflight.check_weight_files(folder)
        try:
            if (folder / preflight.INDEX).exists():
                index = json.loads((folder / preflight.INDEX).read_text())["weight_map"]
                names = sorted(set(index.values()))
            else:
                names = [preflight.WEIGHTS]
            if odd := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{preflight.INDEX} names {odd[0]}, outside the folder")
            self._headers = {name: header(folder / name) for name in names}
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{folder}: damaged weights: {error}") from None
        self.file_of = {
            name: file for file, entries in self._headers.items() for name in entries if name != "__metadata__"
        }
        if (folder / preflight.INDEX).exists() and (missing := sorted(set(index) - set(self.file_of))):
            raise UserError(f"{folder}: {missing[0]} is not in the file that {preflight.INDEX} names")

    def info(self, name: str) -> dict[str, Any]:
        """``dtype`` and ``shape`` of a tensor as its file states them, with the byte range ``data_offsets``."""
        return self._headers[self.file_of[name]][name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows ``begin`` to ``end`` of a tensor, in the dtype of the file."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_tensor(name) if end is None else file.get_slice(name)[begin:end]

    def data(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces."""
        path = self.folder / self.file_of[name]
        with path.open("rb") as file:
            base = 8 + struct.unpack("<Q", file.read(8))[0]
            begin, end = self.info(name)["data_offsets"]
            file.seek(base + begin)
            for offset in range(begin, end, 1 << 22):
                yield file.read(min(1 << 22, end - offset))

    def row(self, name: str, row: int) -> Tensor:
        """One row, from the bytes of the file rather than by the reader that filled the model."""
        info = self.info(name)
        dtype, row_shape = DTYPES[info["dtype"]], info["shape"][1:]
        size = dtype.itemsize * int(torch.Size(row_shape).numel())
        with (self.folder / self.file_of[name]).open("rb") as file:
            base = 8 + struct.unpack("<Q", file.read(8))[0]
            file.seek(base + info["data_offsets"][0] + row * size)
            return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(row_shape)


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises ``ValueError``, ``OSError`` or ``struct.error`` for one that is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            raise ValueError(f"{path.name} is not a complete safetensors file")
        entries = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, its header speaks of {8 + length + end}")
    return entries


def digest(folder: Path, cache_dir: Path, beat: Callable[[], None] = lambda: None) -> str:
    """sha256 over name, dtype, shape and sha256 of every tensor of ``folder``: the same weights, the same digest.

    Every rank hashes its share of the tensors and calls ``beat`` while it does; remembered in ``cache_dir`` by path, size and
    times. Collective.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with together():
        stored = ModelFolder(folder)
        paths = [folder / file for file in sorted(set(stored.file_of.values()))]
        stats = [(path.name, (s := path.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path in paths]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()[:24]
        remembered = cache_dir.expanduser() / "digests" / key
        known = remembered.read_text() if remembered.exists() else ""
    if all(gather(len(known) == 64)):
        return known

    def hash_tensor(name: str) -> tuple[str, str]:
        state = hashlib.sha256()
        for piece in stored.data(name):
            state.update(piece)
            beat()
        return name, state.hexdigest()

    with together():
        mine = sorted(stored.file_of)[rank::ranks]
        with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
            hashes = dict(pool.map(hash_tensor, mine))
    merged = {name: value for share in gather(hashes) for name, value in share.items()}
    result = combine({name: (stored.info(name)["dtype"], stored.info(name)["shape"], merged[name]) for name in merged})
    with contextlib.suppress(OSError):  # only a shortcut
        remembered.parent.mkdir(parents=True, exist_ok=True)
        files.write(remembered, result)
    return result


def combine(tensors: Mapping[str, tuple[str, list[int], str]]) -> str:
    """The digest of a model from the dtype, as safetensors names it, shape and sha256 of each of its tensors."""
    lines = [f"{name} {dtype} {shape} {sha256}" for name, (dtype, shape, sha256) in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of tensors, in the order in which they come."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The memory of a tensor on the host, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)
