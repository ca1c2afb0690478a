"""The weights of a Hugging Face folder: safetensors files, read by name and rows, and their digest.

    model.safetensors, or model-0000x-of-0000n.safetensors and an index        [m, n] row-major, little-endian

Files are open only during a read, and nothing is unpickled. Weights that are stored quantised appear as those that they stand
for, see :mod:`liftdist.models.quantised_files`: under their names, with their shapes, also in the digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from liftdist.digests import CachedDigest
from liftdist.distributed.collectives import gather, together
from liftdist.errors import UserError
from liftdist.models import check, stored
from liftdist.models.quantised_files import find
from liftdist.safetensors_header import data_begin, header
from liftdist.safetensors_io import DTYPES, TensorFile, bytes_of, dtype_name, memory_of


class ModelFolder:
    """The safetensors files of a folder that transformers loads, opened one at a time, read by name and rows.

    ``file_of`` has the file of each tensor; ``quantised`` those that are stored quantised.

    Raises:
        UserError: as :func:`liftdist.models.stored.resolve` and :func:`liftdist.models.quantised_files.find`, or a tensor has a
            dtype that is not read, or of one that is quantised other files hold parts as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored = stored.resolve(folder)
        files = self.stored.file_of
        entries = {name: self.stored.headers[file][name] for name, file in files.items()}
        for name, file in files.items():
            if (dtype := entries[name]["dtype"]) not in DTYPES:
                raise UserError(f"{folder / file}: {name} is {dtype}; convert it to one of {', '.join(DTYPES)}")
        self._files = {file: TensorFile(folder / file, held) for file, held in self.stored.headers.items()}
        self._stamps = {file: _stamp(folder / file) for file in self._files}
        path = folder / "config.json"
        config = check.read_json(path) if path.exists() else {}
        try:
            self.quantised = find(config, entries, self._stored_rows)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        parts = {part: tensor for tensor in self.quantised.values() for part in tensor.parts}
        if twice := sorted(parts.keys() & self.stored.copies.keys()):
            held = ", ".join([files[twice[0]], *self.stored.copies[twice[0]]])
            raise UserError(f"{folder}: {held} hold the same quantised weights ({twice[0]}); keep one of them")
        self.file_of = {name: file for name, file in files.items() if name not in parts}
        self.file_of |= {name: files[tensor.parts[0]] for name, tensor in self.quantised.items()}

    def changed(self) -> str | None:
        """Which file is another than when this was made, or gone, if one is."""
        for file, stamp in self._stamps.items():
            path = self.folder / file
            if not path.exists() or _stamp(path) != stamp:
                return f"{path}: {'has changed' if path.exists() else 'is gone'}"
        return None

    def check_unchanged(self, why: str) -> None:
        """Raises ``UserError``, which says ``why`` they are read again, if :meth:`changed` during a run."""
        if problem := self.changed():
            raise UserError(f"{problem} since the run began; {why}: restore it, and continue the run")

    def info(self, name: str) -> dict[str, Any]:
        """``dtype`` and ``shape`` of a tensor, from the header of its file."""
        if (tensor := self.quantised.get(name)) is not None:
            return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        return self.stored.headers[self.file_of[name]][name]

    def read(self, name: str) -> Tensor:
        """A tensor, in the dtype of the file, or of the weights that it stands for."""
        if (tensor := self.quantised.get(name)) is not None:
            return self.rows(name, 0, math.prod(tensor.shape[:-1])).view(tensor.shape)
        return self._files[self.file_of[name]].read(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """``[end - begin, n]``: rows of a tensor ``[..., n]`` seen as ``[all, n]``; of a vector its entries ``[end - begin]``."""
        if (tensor := self.quantised.get(name)) is not None:
            return tensor.rows(self._stored_rows, begin, end)
        return self._stored_rows(name, begin, end)

    def _stored_rows(self, name: str, begin: int, end: int) -> Tensor:
        return self._files[self.stored.file_of[name]].rows(name, begin, end)

    def data(self, name: str, file_name: str | None = None) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces of some MiB; those of its copy in another file, if one is given."""
        if (tensor := self.quantised.get(name)) is not None:
            for begin, end in tensor.pieces(0, math.prod(tensor.shape[:-1])):
                yield bytes_of(tensor.rows(self._stored_rows, begin, end))
            return
        path = self.folder / (file_name or self.file_of[name])
        begin, end = (header(path) if file_name else self.stored.headers[self.file_of[name]])[name]["data_offsets"]
        with path.open("rb") as file:
            file.seek(data_begin(file) + begin)
            for offset in range(begin, end, 1 << 22):
                yield file.read(min(1 << 22, end - offset))

    def row(self, name: str, row: int) -> Tensor:
        """One row, as safetensors reads it, independently of :meth:`rows` where it is not quantised."""
        if name in self.quantised:
            return self.rows(name, row, row + 1).flatten()
        shape = self.info(name)["shape"]
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            if len(shape) < 2:
                return file.get_tensor(name).view(-1)[row : row + 1]
            place = np.unravel_index(row, shape[:-1])
            return file.get_slice(name)[tuple(slice(int(at), int(at) + 1) for at in place)].flatten()

    def column(self, name: str, column: int, first: int, rows: int) -> Tensor:
        """The entries of a column in ``rows`` rows of one matrix of a tensor, as :meth:`row`."""
        if name in self.quantised:
            return self.rows(name, first, first + rows)[:, column]
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            *outer, row = (int(at) for at in np.unravel_index(first, self.info(name)["shape"][:-1]))
            block = (*(slice(at, at + 1) for at in outer), slice(row, row + rows), slice(column, column + 1))
            return file.get_slice(name)[block].flatten()


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def threads() -> ThreadPoolExecutor:
    """As many as torch has, for what is done with one tensor after the other."""
    return ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads()))


def _cached(model: ModelFolder, cache_dir: Path) -> CachedDigest:
    used = {*model.stored.file_of.values(), *(file for files in model.stored.copies.values() for file in files)}
    kind = "weights"
    if model.quantised:  # whose values the config decides, too
        kind, used = "dequantised weights", used | {"config.json"}
    return CachedDigest(kind, [model.folder / file for file in sorted(used)], cache_dir)


def known_digest(model: ModelFolder, cache_dir: Path) -> str | None:
    """:func:`digest`, if it is in the cache."""
    return _cached(model, cache_dir).read()


def digest(folder: Path, cache_dir: Path, beat: Callable[[], None] = lambda: None) -> str:
    """sha256 over name, dtype, shape and sha256 of every tensor of ``folder``: equal weights have equal digests.

    Every rank hashes its share of the tensors and calls ``beat`` meanwhile. Cached in ``cache_dir`` by path, size and times.
    Collective.

    Raises:
        UserError: as :func:`liftdist.models.stored.resolve`, or another file of the folder holds other values of a tensor.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with together():
        model = ModelFolder(folder)
        places = [(name, file) for name, file in model.file_of.items()]
        places += [(name, file) for name, files in model.stored.copies.items() for file in files]
        cached = _cached(model, cache_dir)
        known = cached.read()
    if all(gather(known is not None)):
        assert known is not None
        return known

    def hash_tensor(place: tuple[str, str]) -> tuple[tuple[str, str], str]:
        name, file = place
        state = hashlib.sha256()
        for piece in model.data(name, None if file == model.file_of[name] else file):
            state.update(piece)
            beat()
        return place, state.hexdigest()

    with together(), threads() as pool:
        hashes = dict(pool.map(hash_tensor, sorted(places)[rank::ranks]))
    merged = {place: value for share in gather(hashes) for place, value in share.items()}
    for name, file in sorted(merged):
        if merged[name, file] != merged[name, model.file_of[name]]:
            raise UserError(stored.conflict(model.stored, name, file))
    result = combine(
        {
            name: (model.info(name)["dtype"], model.info(name)["shape"], merged[name, file])
            for name, file in model.file_of.items()
        }
    )
    cached.write(result)
    return result


def check_copies(model: ModelFolder, cache_dir: Path) -> None:
    """Raises ``UserError`` if other files of a folder hold other values of its tensors. Reads weights only if there are such."""
    if model.stored.copies:
        digest(model.folder, cache_dir)


Digested = tuple[str, list[int], str]  # dtype by its safetensors name, shape, sha256 of the bytes


def digested(tensor: Tensor) -> Digested:
    """What :func:`combine` takes of a tensor on the host."""
    return dtype_name(tensor.dtype), list(tensor.shape), hashlib.sha256(memory_of(tensor)).hexdigest()


def combine(tensors: Mapping[str, Digested]) -> str:
    """The digest of a model from those of its tensors."""
    lines = [f"{name} {dtype} {shape} {sha256}" for name, (dtype, shape, sha256) in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
