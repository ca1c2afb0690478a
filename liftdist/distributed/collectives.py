"""Collectives by which ranks take the same decision.

Whether to stop, fail or continue is decided collectively: a rank that acted alone would leave the others waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.errors import PeerError, Stopped, UserError

T = TypeVar("T")

Group = dist.ProcessGroup | None  # None: a single process
_LOOK = 0.1  # seconds between two looks of a rank at work that takes long

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
    return bool(_highest(int(flag)))


def _highest(number: int) -> int:
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number, dtype=torch.int32)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


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


class _GivenUp(Exception):
    """Another rank has failed, and what this one does is of no use."""


def all_work(work: Callable[[Callable[[], None]], T], alive: Callable[[], None]) -> T:
    """``work(check)`` on every rank, for as long as it takes the slowest. Collective.

    The work runs in a thread, and ranks tell each other meanwhile how far they are: none waits in a collective for longer than
    a moment, and an error or a stop request on one ends the work of all.

    Args:
        work: does no collective, and calls ``check`` at any progress.
        alive: called by ``check``, and while this rank has finished and others have not; may raise an error of this rank.

    Raises:
        As :func:`together`.
    """
    done: list[T] = []
    failed: list[BaseException] = []
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise _GivenUp
        alive()

    def run() -> None:
        try:
            done.append(work(check))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="work", daemon=True)
    thread.start()
    try:
        while state := _highest(2 if failed else 0 if done else 1):
            if state == 2:
                break
            if not done:
                thread.join(_LOOK)
                continue
            try:
                alive()
            except Exception as error:
                failed.append(error)
            time.sleep(_LOOK)
    finally:
        given_up.set()
    thread.join()
    with together():
        if failed and not isinstance(failed[0], _GivenUp):
            raise failed[0]
    return done[0]


def all_reduce_sum(tensor: Tensor, *groups: Group) -> Tensor:
    """Sum over ``groups``, one after the other, in place."""
    for group in groups:
        if group is not None:
            dist.all_reduce(tensor, group=group)
    return tensor
