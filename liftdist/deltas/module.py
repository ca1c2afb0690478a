"""Deltas applied to a model in memory, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from liftdist.deltas.delta import Change, Delta, by_name, check_disjoint, check_same_base, edit, loses
from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import rows_local
from liftdist.errors import UserError
from liftdist.models import names
from liftdist.models.names import Piece


def change_module(
    module: nn.Module, apply: Delta | None = None, undo: Delta | None = None, beside: Sequence[Delta] = ()
) -> None:
    """Apply a delta to a model in memory, undo one, or swap one for another; the model may be sharded by rows.

    Everything is checked before anything is written. Deltas that change different weights may be applied and undone in any order.

    Args:
        beside: deltas that are applied and stay, to be checked for weights that they share with the others; that the model
            holds them is not checked.

    Raises:
        UserError: the model lacks a tensor, or holds it with another shape or other weights than the delta expects, or in a dtype
            in which what is applied is rounded; or a delta shares weights with one of ``beside``.
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
            raise UserError(
                f"the model has no {name}; if that is tied to another tensor in memory, change the folder (liftdist apply), and "
                "load it"
            )
        shape = shapes[name]
        for change in valued(name, undo, apply):
            if change.shape != shape:
                turned = change.shape == (*shape[:-2], *shape[:-3:-1])
                remedy = (
                    "; if files hold it transposed, change the folder (liftdist apply), and load it" if turned else ""
                )
                raise UserError(f"{name} is {list(shape)}, the delta is for {list(change.shape)}{remedy}")
        for piece in pieces[name]:
            param = params[piece.source]
            first, rows = rows_local(param)
            begin, end = max(piece.source_row - first, 0), min(piece.source_row + piece.rows - first, len(rows))
            if begin >= end:
                continue
            own = rows[begin:end]
            offset = first + begin - piece.source_row + piece.row  # of the first of them in the tensor
            undone, applied = (
                [change.rows(offset, offset + len(own)) for change in valued(name, delta)] for delta in (undo, apply)
            )
            for change in applied:
                if loses(change.values, own.dtype):
                    raise UserError(
                        f"{name}: the model's {own.dtype} does not hold the delta's values of {change.dtype}, and would undo "
                        f"most changes by rounding; load the model with dtype={change.dtype}"
                    )
            undone, applied = ([change.to(own.dtype) for change in some] for some in (undone, applied))
            yield own, edit(name, own, undone, applied)

    with torch.no_grad():
        with together():
            check_same_base(apply, undo)
            for delta in (apply, undo):
                if delta is not None:
                    check_disjoint(delta, beside)
            for name in stored:
                for _ in edited(name):
                    pass
        for name in stored:
            for own, result in edited(name):
                own.copy_(result)


def valued(name: str, *given: Delta | None) -> list[Change]:
    """The changes of a tensor. Raises ``UserError`` for those of a compressed delta, which cannot be checked in memory."""
    found = []
    for delta in given:
        change = by_name(name, delta)
        if change is None:
            continue
        if not isinstance(change, Change):
            raise UserError(
                f"{delta and delta.location}: is compressed; give it with the folder of its base model: "
                "liftdist.deltas.difference.on(delta, ModelFolder(folder))"
            )
        found.append(change)
    return found


def _pieces(module: nn.Module, stored: Iterable[str]) -> tuple[dict[str, list[Piece]], dict[str, tuple[int, ...]]]:
    """The pieces of parameters that each of the tensors ``stored`` consists of, and its shape, without those that are absent."""
    found, shapes = names.in_memory(module)
    own_name = names.between(found, stored, getattr(module, "base_model_prefix", ""))
    return {name: found[own] for own, name in own_name.items()}, {name: shapes[own] for own, name in own_name.items()}
