"""Rows of a checkpoint's tensors, read into the shards of a model, and checked there."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liftdist.distributed.sharding import rows_local, rows_of
from liftdist.engine import quantised
from liftdist.engine.quantised import QuantisedRows
from liftdist.models.build import tensors
from liftdist.models.names import NameMap, Piece
from liftdist.models.weights import ModelFolder

AT_ONCE = 1 << 22  # weights that are read to be quantised


@torch.no_grad()
def fill(model: PreTrainedModel, files: ModelFolder, names: NameMap, check: Callable[[], None]) -> None:
    """Read this rank's rows of every tensor. ``check`` is called after every piece, and may raise."""
    for name, tensor in tensors(model).items():
        held = quantised.held_by(tensor)
        if held is None:
            first, rows = rows_local(tensor)
            stored = _Stored(files, names.pieces[name], first, len(rows))
            for begin, found in stored.read():
                rows[begin : begin + len(found)].copy_(found)
                check()
        else:
            stored = _Stored(files, names.pieces[name], _first_row(tensor), held.here)
            held.original = functools.partial(_at, stored, held)
            for begin, found in stored.read(AT_ONCE // held.format.columns):
                held.fill(begin, found)
                check()


@torch.no_grad()
def verify(model: PreTrainedModel, files: ModelFolder, names: NameMap, rng: random.Random) -> None:
    """Compare a random row of every tensor in the model with that of its file. Catches misplaced rows."""
    for name, tensor in tensors(model).items():
        held = quantised.held_by(tensor)
        first, rows = rows_local(tensor) if held is None else (_first_row(tensor), held)
        if not len(rows) or not names.pieces[name]:
            continue
        row = rng.randrange(len(rows))
        piece = next(p for p in names.pieces[name] if p.row <= first + row < p.row + p.rows)
        place = first + row - piece.row
        if piece.across:
            stored = files.column(piece.source, place, piece.source_row, piece.across)
        else:
            stored = files.row(piece.source, place + piece.source_row)
        expected = stored.to(tensor.dtype)
        if held is not None:
            expected = held.format.rounded(expected.unsqueeze(0))
        if not torch.equal(rows[row].cpu().flatten(), expected.flatten()):
            raise RuntimeError(f"{name}: row {first + row} is not what {files.file_of[piece.source]} holds")


def _first_row(tensor: Tensor) -> int:
    return rows_of(tensor)[0] * tensor.shape[1:-1].numel()


class _Stored:
    """What files hold of ``number`` rows of a tensor from ``first`` on."""

    def __init__(self, files: ModelFolder, pieces: Sequence[Piece], first: int, number: int) -> None:
        self._files, self._pieces, self._first, self._number = files, pieces, first, number

    def check_unchanged(self) -> None:
        """Raises ``UserError`` if other files are there than when the model was loaded."""
        self._files.check_unchanged("with model.base_dtype a selection reads the base model again")

    def read(self, at_once: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Places among the rows, and the rows ``[k, n]`` from there on; at most ``at_once``, but one, or one matrix, at least."""
        for piece in self._pieces:
            begin = max(piece.row - self._first, 0)
            end = min(piece.row + piece.rows - self._first, self._number)
            if piece.across and begin < end:  # at once: each of its rows is in all of those there
                columns = slice(self._first + begin - piece.row, self._first + end - piece.row)
                yield (
                    begin,
                    self._files.rows(piece.source, piece.source_row, piece.source_row + piece.across)[:, columns].T,
                )
                continue
            step = max(at_once or end - begin, 1)
            for row in range(begin, end, step):
                stored = self._first + row - piece.row + piece.source_row
                yield row, self._files.rows(piece.source, stored, stored + min(step, end - row))


def _at(stored: _Stored, held: QuantisedRows, positions: Tensor) -> Tensor:
    """``[k]``: the stored weights at ascending ``positions [k]``."""
    stored.check_unchanged()
    columns, where = held.format.columns, positions.cpu().long()
    found = torch.empty(where.numel(), dtype=held.dtype)
    for begin, rows in stored.read(AT_ONCE // columns):
        bounds = where.new_tensor([begin * columns, begin * columns + rows.numel()])
        low, high = torch.searchsorted(where, bounds).tolist()
        found[low:high] = rows.reshape(-1)[where[low:high] - begin * columns].to(held.dtype)
    return found.to(held.buffer.device)
