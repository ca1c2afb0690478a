"""Collectives by which ranks take the same decision.

Whether to stop, fail or continue is decided collectively: a rank that acted alone would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.errors import PeerError, Stopped, UserError

Group = dist.ProcessGroup | None  # None: a single process

# renamed in torch 2.12
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(value: Any, group: Group = None) -> list[Any]:
    """``value`` of every rank, by rank, on every rank. ``group``, if given, must contain all ranks. Collective."""
    if not dist.is_initialized():
        if group is not None:
            raise RuntimeError("the process group has been destroyed")
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agree(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank. Exchanges one number per rank through the CPU backend. Collective."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


@contextmanager
def together() -> Iterator[None]:
    """An error inside the block, on any rank, is raised on every rank at the end of the block. Collective.

    If several ranks fail, all raise the same kind: a bug takes precedence over a ``UserError``, and that over ``Stopped``;
    within a kind, the lowest rank. The block must not contain collectives that a failed rank would miss.
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
