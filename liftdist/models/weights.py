"""The weights of a Hugging Face folder: safetensors files, read by name and rows, and their digest.

    model.safetensors, or model-0000x-of-0000n.safetensors and an index        [m, n] row-major, little-endian

Files are open only during a read, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from liftdist.digests import CachedDigest
from liftdist.distributed.collectives import gather, together
from liftdist.errors import UserError
from liftdist.models import check
from liftdist.safetensors_io import DTYPES, data_begin, header


class ModelFolder:
    """The safetensors files of a folder, opened one at a time, read by name and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check.check_weight_files(folder)
        try:
            if (folder / check.INDEX).exists():
                index = json.loads((folder / check.INDEX).read_text())["weight_map"]
                names = sorted(set(index.values()))
            else:
                names = [check.WEIGHTS]
            if odd := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{check.INDEX} names {odd[0]}, outside the folder")
            self._headers = {name: header(folder / name) for name in names}
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{folder}: damaged weights: {error}; restore or download them again") from None
        self.file_of = {
            name: file for file, entries in self._headers.items() for name in entries if name != "__metadata__"
        }
        if (folder / check.INDEX).exists() and (missing := sorted(set(index) - set(self.file_of))):
            raise UserError(f"{folder}: {missing[0]} is not in the file that {check.INDEX} names")

    def info(self, name: str) -> dict[str, Any]:
        """``dtype``, ``shape`` and the byte range ``data_offsets`` of a tensor, from the header of its file."""
        return self._headers[self.file_of[name]][name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows ``begin`` to ``end`` of a tensor, in the dtype of the file."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_tensor(name) if end is None else file.get_slice(name)[begin:end]

    def data(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces of at most 4 MiB."""
        path = self.folder / self.file_of[name]
        with path.open("rb") as file:
            begin, end = self.info(name)["data_offsets"]
            file.seek(data_begin(file) + begin)
            for offset in range(begin, end, 1 << 22):
                yield file.read(min(1 << 22, end - offset))

    def row(self, name: str, row: int) -> Tensor:
        """One row, from the bytes of the file, independently of :meth:`read`."""
        info = self.info(name)
        dtype, row_shape = DTYPES[info["dtype"]], info["shape"][1:]
        size = dtype.itemsize * int(torch.Size(row_shape).numel())
        with (self.folder / self.file_of[name]).open("rb") as file:
            file.seek(data_begin(file) + info["data_offsets"][0] + row * size)
            return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(row_shape)


def digest(folder: Path, cache_dir: Path, beat: Callable[[], None] = lambda: None) -> str:
    """sha256 over name, dtype, shape and sha256 of every tensor of ``folder``: equal weights have equal digests.

    Every rank hashes its share of the tensors and calls ``beat`` meanwhile. Cached in ``cache_dir`` by path, size and times.
    Collective.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with together():
        stored = ModelFolder(folder)
        cached = CachedDigest("weights", [folder / file for file in sorted(set(stored.file_of.values()))], cache_dir)
        known = cached.read()
    if all(gather(known is not None)):
        assert known is not None
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
    cached.write(result)
    return result


def combine(tensors: Mapping[str, tuple[str, list[int], str]]) -> str:
    """The digest of a model from the dtype (by its safetensors name), shape and sha256 of each of its tensors."""
    lines = [f"{name} {dtype} {shape} {sha256}" for name, (dtype, shape, sha256) in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
