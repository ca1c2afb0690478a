"""The few collectives by which ranks agree.

Decisions that every rank must take alike (stop, give up, go on) are collective: a rank that acted alone would leave the
others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.errors import PeerError, Stopped, UserError

Group = dist.ProcessGroup | None  # None: this process alone

# by their names since torch 2.12, or before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(value: Any, group: Group = None) -> list[Any]:
    """``value`` of every rank, by rank, on every rank; over ``group``, which then must hold all ranks."""
    if not dist.is_initialized():
        if group is not None:
            raise RuntimeError("the process group is gone")
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agree(flag: bool) -> bool:
    """Whether any rank says so: one number a rank, over the host's network."""
    if not dist.is_initialized():
        return flag
    said = torch.tensor(int(flag), dtype=torch.int32)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)


@contextmanager
def together() -> Iterator[None]:
    """An error inside, on any rank, is raised on every rank at the end of the block.

    If ranks have different ones, all raise of the same kind: a bug before a ``UserError`` before ``Stopped``, the lowest
    rank's first. The block must not hold collectives that a failed rank would miss.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if error is not None and not dist.is_initialized():
        raise error
    kinds = (PeerError, UserError, Stopped)
    kind = next((number for number in (1, 2) if isinstance(error, kinds[number])), 0)
    reports = gather(None if error is None else (kind, dist.get_rank(), f"{type(error).__name__}: {error}", str(error)))
    found = [report for report in reports if report is not None]
    if not found:
        return
    chosen, rank, long, short = min(found)
    if error is not None and kind == chosen:
        raise error
    raise kinds[chosen](short if chosen else f"rank {rank} failed: {long}")


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over ``group``, in place."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor
