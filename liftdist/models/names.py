"""Where each tensor of a model is in its checkpoint.

Most are stored under their own name, or under another one. Some, such as the experts of a layer, are put together from several
tensors. transformers describes both by renamings and converters. A converter that leaves rows whole is a map of rows: it is run
here on numbers of rows in place of their weights, and the result says where each row of a parameter is stored.

    model.layers.0.mlp.experts.gate_up_proj [E, 2 I, H]     rows 0 to I        experts.0.gate_proj.weight [I, H]
                                                            rows I to 2 I      experts.0.up_proj.weight [I, H]
                                                            rows 2 I to 3 I    experts.1.gate_proj.weight [I, H], and so on

A row is a slice along the last dimension: ``[E, 2 I, H]`` has ``2 E I``. Of a vector it is one entry. A converter that transposes
makes them of columns, of matrix after matrix:

    model.layers.0.mlp.experts.down_proj [E, H, I]          rows 0 to H        columns of rows 0 to I of it, [E, I, H]
"""

from __future__ import annotations

import bisect
import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from liftdist.engine.matrices import Place
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.build import build, check_type, tensors
from liftdist.models.part import Part
from liftdist.models.weights import ModelFolder

_FLOATS = ("F64", "F32", "F16", "BF16")


class Piece(NamedTuple):
    """Consecutive rows of a tensor which are consecutive rows of another one, its source, or all columns of such rows."""

    source: str
    source_row: int  # the first, there
    row: int  # the first, here
    rows: int
    across: int = 0  # if not 0, row i here is column i there, in so many rows


@dataclass(frozen=True)
class NameMap:
    """The pieces of tensors of the checkpoint that each tensor of the model consists of; of what was added to the model, none.

    Made when a model is loaded; what it says of trained matrices is kept with the run.
    """

    pieces: Mapping[str, tuple[Piece, ...]]  # by the name in the model, in the order of rows
    stored: Mapping[
        str, str
    ]  # the name in the checkpoint, by the name in the model, of all that are stored as they are
    copies: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # other tensors of the checkpoint that must be equal to one: of a head that is tied, but stored as well

    @cached_property
    def parameter(self) -> dict[str, str]:
        """The inverse of :attr:`stored`."""
        return {stored: name for name, stored in self.stored.items()}

    def holding(self, name: str, place: Place) -> tuple[str, Part]:
        """The tensor of the checkpoint that holds a matrix, and where. Raises ``UserError`` if there is no such tensor."""
        pieces = self.pieces[place.parameter]
        piece = pieces[bisect.bisect(pieces, place.first_row, key=lambda piece: piece.row) - 1]
        if place.first_row + place.rows <= piece.row + piece.rows:
            if piece.across:
                first = (piece.source_row + place.first_column) * piece.rows + place.first_row - piece.row
                return piece.source, Part(first, 1, place.step * piece.rows)
            first = piece.source_row + place.first_row - piece.row
            return piece.source, Part(first * place.width + place.first_column, place.width, place.step)
        parts = ", ".join(piece.source for piece in pieces)
        raise UserError(
            f"{name}: is stored in several tensors ({parts}): not supported; leave it out of selection.modules"
        )

    def changed(self, name: str, place: Place) -> tuple[str, Part | None]:
        """:meth:`holding`, without a part if the matrix has the indices that it has in the tensor."""
        stored, part = self.holding(name, place)
        return stored, None if part.is_whole(place.columns) else part


def between(own: Iterable[str], stored: Iterable[str], prefix: str) -> dict[str, str]:
    """The name in ``stored`` of each of ``own``: itself, or itself without ``prefix``. Those not stored are left out."""
    known = set(stored)
    short = {name: name.removeprefix(f"{prefix}.") for name in own}
    return {name: name if name in known else bare for name, bare in short.items() if {name, bare} & known}


def of_folder(folder: Path, trust_remote_code: bool = False) -> NameMap:
    """The map of a model folder. Reads no weights. Raises ``UserError`` like :func:`match`."""
    config = ModelConfig(path=str(folder), trust_remote_code=trust_remote_code)
    return match(build(check_type(folder, config), config), ModelFolder(folder))


def in_memory(model: nn.Module) -> tuple[dict[str, list[Piece]], dict[str, tuple[int, ...]]]:
    """The tensors of a checkpoint of ``model``, as transformers would save it: the parameters' pieces of each, and its shape."""
    numbers, params = _RowNumbers(), dict(model.named_parameters())
    state = {name: numbers.of(name, param.shape) for name, param in params.items()}
    if isinstance(model, PreTrainedModel):
        state = revert_weight_conversion(_OfRows(model), state)
    pieces = {name: numbers.runs(rows) for name, rows in state.items()}
    widths = {name: params[found[0].source].shape[-1:] for name, found in pieces.items()}
    return pieces, {name: (*rows.shape[:-1], *widths[name]) for name, rows in state.items()}


def same(own: Mapping[str, Tensor]) -> NameMap:
    """The map of a checkpoint that has the tensors of the model as they are."""
    return NameMap(
        {name: (Piece(name, 0, 0, rows_in(tensor.shape)),) for name, tensor in own.items()},
        {name: name for name in own},
    )


def match(model: PreTrainedModel, files: ModelFolder) -> NameMap:
    """The map between a model, which may be on the meta device, and its files.

    Raises:
        UserError: a tensor is absent, of another shape, left over, or stored in a form that is not supported.
    """
    own = tensors(model)
    found = _Found(model, files)
    pieces: dict[str, tuple[Piece, ...]] = {}
    stored: dict[str, str] = {}
    copies: dict[str, tuple[str, ...]] = {}
    problems = list(found.problems)
    for name, tensor in own.items():
        named = next(
            (key for key in found.names_of(tensor, name) if key in found.whole or key in found.converted), None
        )
        if named is None:
            problems.append(f"{name} is not in the checkpoint")
        elif named in found.converted:
            pieces[name] = found.converted[named]
        else:
            stored[name] = found.whole[named]
            pieces[name] = (Piece(stored[name], 0, 0, rows_in(tensor.shape)),)
            others = {found.whole[key] for key in found.names_of(tensor, name) if key in found.whole} - {stored[name]}
            copies |= {stored[name]: tuple(sorted(others))} if others else {}
            if (shape := files.info(stored[name])["shape"]) != list(tensor.shape):
                problems.append(f"{name} is {shape} in the checkpoint, {list(tensor.shape)} in the model")
    numbers = {name: found_pieces for name, found_pieces in pieces.items() if own[name].is_floating_point()}
    for name in dict.fromkeys(piece.source for found_pieces in numbers.values() for piece in found_pieces):
        if files.info(name)["dtype"] not in _FLOATS:
            problems.append(f"{name} has dtype {files.info(name)['dtype']}: quantised weights are not supported")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"model.path {files.folder}: does not hold the weights of {type(model).__name__} in a form that is supported: "
            + "; ".join(problems[:3])
            + more
        )
    return NameMap(pieces, stored, copies)


class _Found:
    """What transformers makes of each tensor of a checkpoint."""

    def __init__(self, model: PreTrainedModel, files: ModelFolder) -> None:
        self.model, self.files = model, files
        self.state = model.state_dict(keep_vars=True)  # all names, also of shared parameters
        self.whole: dict[str, str] = {}  # the stored name of what is stored as it is, by the name in the model
        self.converted: dict[str, tuple[Piece, ...]] = {}
        self.problems: list[str] = []
        self._names: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            self._names.setdefault(id(tensor), []).append(name)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._assign()

    def names_of(self, tensor: Tensor, name: str) -> list[str]:
        """All names of a tensor in the model, ``name`` first."""
        return [name, *(other for other in self._names.get(id(tensor), []) if other != name)]

    def _assign(self) -> None:
        ignored = _ignored(self.model)
        converting: dict[str, WeightConverter] = {}
        numbers = _RowNumbers()
        for stored in sorted(self.files.file_of, key=dot_natural_key):
            name, pattern = self._renamed(stored)
            if name not in self.state:
                if not ignored(name) and not ignored(stored):
                    self.problems.append(f"{stored} of the checkpoint is not in the model")
            elif pattern is None:
                if name in self.whole:
                    self.problems.append(f"{self.whole[name]} and {stored} are both {name}")
                self.whole[name] = stored
            else:
                matching = next(c for c in self._converters if pattern in c.source_patterns)
                converter = converting.setdefault(name, copy.deepcopy(matching))
                converter.add_tensor(name, stored, pattern, numbers.of(stored, self.files.info(stored)["shape"]))
        for name, converter in converting.items():
            steps = ", ".join(type(operation).__name__ for operation in converter.operations)
            sources = sorted(converter.layer_targets[name], key=dot_natural_key)
            try:
                made = converter.convert(name, model=_OfRows(self.model), config=self.model.config)
            except Exception as error:  # the library raises errors of many kinds
                made, steps = {name: torch.empty(0)}, f"{steps}: {str(error).splitlines()[0] if str(error) else error}"
            rows_of = {target: rows[0] if isinstance(rows, list) else rows for target, rows in made.items()}
            transposes = any(isinstance(operation, Transpose) for operation in converter.operations)
            is_map = numbers.are_those_of(sources, rows_of.values())
            for target, rows in rows_of.items():
                find = self._columns if transposes and rows.shape[-1:] != (1,) else self._pieces
                pieces = find(target, rows, numbers) if is_map and target in self.state else None
                if pieces is None:
                    self.problems.append(f"{sources[0]} would have to be converted ({steps})")
                else:
                    self.converted[target] = pieces

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of a converter if there is one that applies."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self.state)
        if name not in self.state and stored in self.state:
            return rename_source_key(stored, [], [], prefix, self.state)
        return name, pattern

    def _pieces(self, name: str, rows: Tensor, numbers: _RowNumbers) -> tuple[Piece, ...] | None:
        """The pieces of a tensor from the numbers of its rows; None if rows are not whole, or not in runs."""
        shape = self.state[name].shape
        if tuple(rows.shape) != (*shape[:-1], 1 if len(shape) > 1 else shape[0]):
            return None
        pieces = numbers.runs(rows)
        sources = {piece.source for piece in pieces}
        widths = {self.files.info(source)["shape"][-1] for source in sources}
        if len(pieces) > len(sources) or (len(shape) > 1 and widths != {shape[-1]}):
            return None
        return tuple(pieces)

    def _columns(self, name: str, rows: Tensor, numbers: _RowNumbers) -> tuple[Piece, ...] | None:
        """The pieces of a tensor whose rows are columns, one for each matrix in it, from the numbers of rows with those."""
        shape = self.state[name].shape
        if tuple(rows.shape) != (*shape[:-2], 1, shape[-1]):
            return None
        pieces = []
        for number, block in enumerate(rows.reshape(-1, shape[-1])):
            (piece, *others) = numbers.runs(block)
            if others or self.files.info(piece.source)["shape"][-1] != shape[-2]:
                return None
            pieces.append(Piece(piece.source, piece.source_row, number * shape[-2], shape[-2], piece.rows))
        return tuple(pieces)


class _OfRows:
    """Stands for a model where a converter asks for the shape of a parameter: that of the numbers of its rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        param = self._model.get_parameter(name)
        return param[..., :1] if param.ndim > 1 else param


class _RowNumbers:
    """Numbers that stand for the rows of the tensors of a checkpoint."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._places: dict[str, int] = {}  # in the list
        self._firsts = [0]

    def of(self, name: str, shape: Sequence[int]) -> Tensor:
        """``[..., 1]`` int64, the numbers of the rows of a tensor ``[..., n]``; those of its entries, if it is a vector."""
        first, rows = self._firsts[-1], rows_in(shape)
        self._places[name] = len(self._names)
        self._names.append(name)
        self._firsts.append(first + rows)
        return torch.arange(first, first + rows).view(*shape[:-1], 1 if len(shape) > 1 else rows)

    def are_those_of(self, names: Iterable[str], found: Iterable[Tensor]) -> bool:
        """Whether ``found`` are the numbers of all rows of the named tensors, each once, in any order."""
        places = sorted(self._places[name] for name in names)
        given = [np.arange(self._firsts[place], self._firsts[place + 1]) for place in places]
        rows = [part.flatten() for part in found]
        if any(part.dtype != torch.int64 for part in rows):
            return False
        return np.array_equal(np.sort(torch.cat(rows).numpy()), np.concatenate(given))

    def runs(self, rows: Tensor) -> list[Piece]:
        """The runs of consecutive rows of one tensor."""
        numbers = rows.flatten().numpy()
        source = np.searchsorted(self._firsts, numbers, side="right") - 1
        begins = np.flatnonzero((np.diff(numbers, prepend=-2) != 1) | (np.diff(source, prepend=-1) != 0))
        ends = [*begins[1:].tolist(), len(numbers)]
        return [
            Piece(self._names[source[begin]], int(numbers[begin]) - self._firsts[source[begin]], begin, end - begin)
            for begin, end in zip(begins.tolist(), ends, strict=True)
        ]


def rows_in(shape: Sequence[int]) -> int:
    return int(torch.Size(shape[:-1] if len(shape) > 1 else shape).numel())


def _ignored(model: PreTrainedModel) -> Callable[[str], Any]:
    """Whether transformers leaves out a tensor of this name: buffers that older checkpoints hold, heads for other tasks."""
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
    if any(name.endswith("position_ids") for name, _ in model.named_buffers()):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in patterns)).search
