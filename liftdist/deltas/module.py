"""Deltas applied to a model in memory, sharded or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from liftdist.deltas.delta import Delta, by_name, check_same_base, edit
from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import local_tensor, rows_of
from liftdist.errors import UserError
from liftdist.models.names import NameMap


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
    names = NameMap.between(params, stored, getattr(module, "base_model_prefix", "")).parameter

    def edited(name: str) -> tuple[Tensor, Tensor]:
        if name not in names:
            raise UserError(f"the model has no {name}")
        param = params[names[name]]
        local, rows = local_tensor(param), rows_of(param)
        changes = []
        for change in (by_name(name, undo), by_name(name, apply)):
            if change is not None and change.shape != tuple(param.shape):
                raise UserError(f"{name} is {list(param.shape)}, the delta is for {list(change.shape)}")
            changes.append(None if change is None else change.rows(*rows).to(local.dtype))
        return local, edit(name, local, *changes)

    with torch.no_grad():
        with together():
            check_same_base(apply, undo)
            for name in stored:
                edited(name)
        for name in stored:
            local, result = edited(name)
            local.copy_(result)
