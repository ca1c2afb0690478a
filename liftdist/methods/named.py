"""Weights that a setting names by files: which of a matrix are in a delta, in a run, or in a selection that was kept.

    a delta file                         the weights that it changes
    a run directory                      the weights that the run has trained, up to its newest checkpoint
    a folder of CACHE_DIR/selections     the weights of the selection

A delta has the names of the model's files, a run and a selection those of the model. They are read matrix by matrix, so that a
rank never holds all indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from liftdist import digests
from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta
from liftdist.engine.matrices import Matrix
from liftdist.engine.selection import ascending_within
from liftdist.errors import UserError
from liftdist.models import names as tensor_names
from liftdist.models.names import NameMap
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint, claims, layout, selections
from liftdist.schema import Config


class Base:
    """The base model of a run as its files: which tensor holds a matrix, and where."""

    def __init__(self, folder: Path, digest: str, trust_remote_code: bool = False) -> None:
        self.folder, self.digest = folder, digest
        self._trust = trust_remote_code

    @cached_property
    def names(self) -> NameMap:
        return tensor_names.of_folder(self.folder, self._trust)

    @cached_property
    def files(self) -> ModelFolder:
        return ModelFolder(self.folder)

    def change(self, delta: Delta, matrix: Matrix, setting: str) -> tuple[Tensor, Tensor | None] | None:
        """What a delta changes in a matrix: ``[k]`` int64 flat indices in it, and ``[k]`` new values; None of a compressed delta.

        Raises:
            UserError: naming ``setting``: the matrix has another shape.
        """
        stored, part = self.names.holding(matrix.name, matrix.place)
        change = deltas.by_name(stored, delta)
        if change is None:
            return None
        shape = self.files.info(stored)["shape"]
        if list(change.shape) != shape:
            raise UserError(
                f"{setting} {delta.location}: {stored} is {list(change.shape)} there, {shape} in model.path"
            )
        inside, indices = part.inside(change.indices, *matrix.shape)
        return indices, change.values[inside] if isinstance(change, deltas.Change) else None


class Named:
    """The weights that ``selection.file`` names. Opened when they are first asked for: a run that continues has its own."""

    def __init__(self, path: Path, base: Base, cache_dir: Path) -> None:
        self.path, self._base, self._cache_dir = path, base, cache_dir

    def __repr__(self) -> str:
        return str(self.path)

    def __call__(self, matrix: Matrix) -> Tensor:
        """``[k]`` int64 sorted flat indices into the whole of a matrix. Raises ``UserError`` if it has another shape there."""
        source = self._source
        shape = source.shapes.get(name := source.name_of(matrix))
        if name not in source.shapes:
            return torch.empty(0, dtype=torch.int64)
        if shape is not None and shape != list(matrix.shape):
            raise UserError(f"selection.file {self.path}: {name} is {shape} there, {list(matrix.shape)} in the model")
        indices = source.indices(matrix)
        if not ascending_within(indices, matrix.numel):
            raise UserError(f"selection.file {self.path}: does not fit {name}, which is {list(matrix.shape)}")
        return indices

    @property
    def digest(self) -> str:
        """Of what the file holds."""
        return self._source.digest

    def check(self, matrices: Iterable[Matrix]) -> None:
        """Raises ``UserError`` if the file is none of these kinds, or names weights of others than the trained ``matrices``."""
        source = self._source
        if others := set(source.shapes) - {source.name_of(matrix) for matrix in matrices}:
            raise UserError(
                f"selection.file {self.path}: names weights of {min(others)}, which is none of the matrices that are trained; "
                "check selection.modules"
            )

    @cached_property
    def _source(self) -> Source:
        try:
            if (self.path / layout.ATTEMPTS).is_dir():
                return _run(self.path)
            if self.path.is_dir():
                return _selection(self.path, self._cache_dir)
            return _delta(self.path, self._base, self._cache_dir)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"selection.file {self.path}: {error}") from None


@dataclass(frozen=True)
class Source:
    """What one kind of file holds."""

    digest: str
    #: Of its matrices, by the names that it has for them; None if it does not say, or that is checked elsewhere.
    shapes: Mapping[str, list[int] | None]
    name_of: Callable[[Matrix], str]  # such a name
    indices: Callable[[Matrix], Tensor]  # [k] int64 sorted flat indices into the whole of a matrix


def _delta(path: Path, base: Base, cache_dir: Path) -> Source:
    delta = delta_file.read(path)

    def indices(matrix: Matrix) -> Tensor:
        change = base.change(delta, matrix, "selection.file")
        assert change is not None
        return change[0]

    def name_of(matrix: Matrix) -> str:
        return base.names.holding(matrix.name, matrix.place)[0]

    return Source(digests.of_file(path, cache_dir), dict.fromkeys(delta.names), name_of, indices)


def _run(path: Path) -> Source:
    accepted = checkpoint.accepted(path, claims.attempts(path))
    if not accepted:
        raise ValueError("the run has no checkpoint")
    name = max(accepted, key=checkpoint.step_number)
    step = checkpoint.open_step(path / layout.CHECKPOINTS / name, accepted[name])
    step.verify(step.manifest.files)
    shapes = {name: parameter.shape for name, parameter in step.manifest.parameters.items()}
    return Source(step.manifest.sha256, shapes, lambda matrix: matrix.name, lambda matrix: step.touched(matrix.name)[0])


def _selection(path: Path, cache_dir: Path) -> Source:
    try:
        file_of = selections.files_of(path)
    except FileNotFoundError:
        raise ValueError("is no delta, no run directory, and no selection of the cache") from None
    digest = digests.of_parts([digests.of_file(file, cache_dir) for file in sorted({f.path for f in file_of.values()})])
    return Source(
        digest,
        dict.fromkeys(file_of),
        lambda matrix: matrix.name,
        lambda matrix: file_of[matrix.name].read(matrix.name).long(),
    )


def digests_of(config: Config) -> dict[str, str]:
    """Digest of the files that a continued run reads again, by setting. Raises ``UserError`` if one cannot be read."""
    paths = [Path(path).expanduser() for path in config.selection.exclude]
    cache_dir = Path(config.cache_dir).expanduser()
    try:
        contents = [digests.of_file(path, cache_dir) for path in paths]
    except OSError as error:
        raise UserError(f"selection.exclude {error.filename}: {error.strerror}") from None
    return {"selection.exclude": digests.of_parts(contents)} if paths else {}


class Excluded:
    """The weights that the deltas of ``selection.exclude`` change.

    Each is a delta of the base model, or the base model has it applied: then it must hold the new values, at every call.
    """

    def __init__(self, config: Config, base: Base) -> None:
        self._base = base
        self.digest = digests_of(config)["selection.exclude"]
        self._deltas = [delta_file.read(Path(path).expanduser()) for path in config.selection.exclude]
        for delta in self._deltas:
            if others := set(delta.names) - set(base.files.file_of):
                raise UserError(
                    f"selection.exclude {delta.location}: changes {min(others)}, which model.path does not have"
                )

    def __call__(self, matrix: Matrix) -> Tensor:
        """``[e]`` int64 sorted flat indices into the whole of a matrix. Raises ``UserError`` if a delta is for another model."""
        found = [torch.empty(0, dtype=torch.int64)]
        for delta in self._deltas:
            change = self._base.change(delta, matrix, "selection.exclude")
            if change is None:
                continue
            if delta.base_digest != self._base.digest:
                self._check_applied(delta, matrix, *change)
            found.append(change[0])
        return torch.cat(found).unique()

    def _check_applied(self, delta: Delta, matrix: Matrix, indices: Tensor, values: Tensor | None) -> None:
        if values is None:
            raise UserError(
                f"selection.exclude {delta.location}: is compressed, so that model.path, which is not its base model, cannot be "
                "checked for it; export it with --format delta"
            )
        local = matrix.cut(indices)
        first = int(torch.searchsorted(indices, matrix.offset_local))
        held = matrix.read(local.to(matrix.device)).cpu()
        wanted = values[first : first + local.numel()].to(held.dtype)
        if not torch.equal(deltas.bits(held), deltas.bits(wanted)):
            raise UserError(
                f"selection.exclude {delta.location}: model.path is neither its base model, nor one that it was applied to: "
                f"{matrix.name} holds other values"
            )
