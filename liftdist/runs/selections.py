"""Cache of selections: computed once, reused by every run with the same inputs.

    CACHE_DIR/selections/KEY/owner-00000-of-00004.safetensors      sorted flat indices of whole matrices, by parameter
                             selection.json                        the file of each parameter

Independent of the world size. The key is a hash of everything that determines the selection: the base weights, their dtype, the
criterion with all of its fields, and the shape and count of every matrix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist import __version__, files, safetensors_io
from liftdist.distributed.collectives import agree, gather, together
from liftdist.engine.matrices import Matrix
from liftdist.engine.selection import Budget, Criterion, ascending_within
from liftdist.safetensors_io import TensorFile


def key(
    base_digest: str,
    criterion: Criterion,
    budget: Budget,
    matrices: Sequence[Matrix],
    counts: Sequence[int],
    excluded: str | None = None,
) -> str:
    """The name of a selection's folder: 24 hex digits.

    Args:
        base_digest: digest of the base model's weights.
        criterion: a dataclass, like ``budget``; all of their fields are part of the key, those with a ``digest`` by it.
        counts: weights to select from each matrix, as the budget allots them.
        excluded: digest of the files that name excluded weights.
    """
    described: Any = [[m.name, m.shape, str(m.dtype), count] for m, count in zip(matrices, counts, strict=True)]
    parts = [__version__, base_digest, _described(criterion), _described(budget), described, excluded]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _described(rule: Any) -> list[Any]:
    """A criterion or a budget, and all that its result depends on besides a matrix."""
    assert dataclasses.is_dataclass(rule)
    assert not isinstance(rule, type)
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    values = {name: getattr(value, "digest", value) for name, value in fields.items()}
    return [f"{type(rule).__module__}.{type(rule).__qualname__}", values]


def write(folder: Path, selected: Mapping[str, Tensor]) -> bool:
    """Write a selection that is distributed over the ranks. Collective.

    Args:
        selected: sorted flat indices of the matrices that this rank owned, by name.

    Returns:
        False if the ranks do not share the file system of ``folder``; nothing is left there then.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    created: Path | None = None
    with together():
        folder.parent.mkdir(parents=True, exist_ok=True)
        created = files.folder_beside(folder) if rank == 0 else None
    temporary: Path = gather(created)[0]
    try:
        if agree(not temporary.is_dir()):
            return False
        file = f"owner-{rank:05d}-of-{ranks:05d}.safetensors"
        with together():
            indices = {name: _smallest(indices).cpu() for name, indices in selected.items()}
            safetensors_io.save(indices, temporary / file)
        file_of = {name: f for names, f in gather((sorted(selected), file)) for name in names}
        with together():
            if rank == 0:
                (temporary / "selection.json").write_text(json.dumps(file_of, indent=1, sort_keys=True))
                if folder.exists():  # damaged, or written by another run meanwhile
                    folder.rename(replaced := folder.with_name(f"{temporary.name}-replaced"))
                    shutil.rmtree(replaced, ignore_errors=True)
                files.publish(temporary, folder)
        return True
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path, matrices: Sequence[Matrix], counts: Sequence[int] | None) -> list[Tensor]:
    """What :func:`liftdist.engine.selection.select` returns, from a folder that :func:`write` wrote. Not collective.

    Args:
        counts: how many weights of each matrix are selected; None: not known before.

    Raises:
        FileNotFoundError: there is no such selection.
        ValueError: a parameter is absent, or the number, order or range of its indices is wrong.
    """
    file_of = files_of(folder)
    result = []
    for number, matrix in enumerate(matrices):
        if matrix.name not in file_of:
            raise ValueError(f"{folder}: no selection for {matrix.name}")
        try:
            indices = file_of[matrix.name].read(matrix.name).long()
        except (OSError, KeyError) as error:
            raise ValueError(f"{file_of[matrix.name].path}: {error}") from None
        count = indices.numel() if counts is None else counts[number]
        if indices.numel() != count or not ascending_within(indices, matrix.numel):
            raise ValueError(f"{folder}: the selection for {matrix.name} is damaged")
        result.append(matrix.cut(indices).to(torch.int32).to(matrix.device))
    return result


def files_of(folder: Path) -> dict[str, TensorFile]:
    """The file that holds the selection of each matrix. Raises ``FileNotFoundError``, or as :class:`TensorFile`."""
    file_of: dict[str, str] = json.loads((folder / "selection.json").read_text())
    opened = {name: TensorFile(folder / name) for name in sorted(set(file_of.values()))}
    return {matrix: opened[name] for matrix, name in file_of.items()}


def _smallest(indices: Tensor) -> Tensor:
    return indices.to(torch.int32) if not indices.numel() or int(indices[-1]) < 2**31 else indices
