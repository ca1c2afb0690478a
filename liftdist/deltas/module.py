"""Deltas applied to a model in memory, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from liftdist.deltas.delta import Delta, by_name, check_same_base, edit
from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import rows_local
from liftdist.errors import UserError
from liftdist.models import names
from liftdist.models.names import Piece


def change_module(module: nn.Module, apply: Delta | None = None, undo: Delta | None = None) -> None:
    """Apply a delta to a model in memory, undo one, or swap one for another; the model may be sharded by rows.

    Everything is checked before anything is written.

    Raises:
        UserError: the model lacks a tensor, or holds it with another shape or other weights than the delta expects.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after a forward, some parameters may be gathered copies
    params = dict(module.named_parameters())
    stored = dict.fromkeys(name for delta in (apply, undo) if delta for name in delta.names)
    pieces, shapes = _pieces(module, stored)

    def edited(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows of a tensor, and what they become."""
        if name not in pieces:
            raise UserError(f"the model has no {name}")
        shape = shapes[name]
        for change in (by_name(name, undo), by_name(name, apply)):
            if change is not None and change.shape != shape:
                raise UserError(f"{name} is {list(shape)}, the delta is for {list(change.shape)}")
        for piece in pieces[name]:
            param = params[piece.source]
            first, rows = rows_local(param)
            begin, end = max(piece.source_row - first, 0), min(piece.source_row + piece.rows - first, len(rows))
            if begin >= end:
                continue
            own = rows[begin:end]
            offset = first + begin - piece.source_row + piece.row  # of the first of them in the tensor
            changes = [
                None if change is None else change.rows(offset, offset + len(own)).to(own.dtype)
                for change in (by_name(name, undo), by_name(name, apply))
            ]
            yield own, edit(name, own, *changes)

    with torch.no_grad():
        with together():
            check_same_base(apply, undo)
            for name in stored:
                for _ in edited(name):
                    pass
        for name in stored:
            for own, result in edited(name):
                own.copy_(result)


def _pieces(module: nn.Module, stored: Iterable[str]) -> tuple[dict[str, list[Piece]], dict[str, tuple[int, ...]]]:
    """The pieces of parameters that each of the tensors ``stored`` consists of, and its shape, without those that are absent."""
    found, shapes = names.in_memory(module)
    own_name = names.between(found, stored, getattr(module, "base_model_prefix", ""))
    return {name: found[own] for own, name in own_name.items()}, {name: shapes[own] for own, name in own_name.items()}
