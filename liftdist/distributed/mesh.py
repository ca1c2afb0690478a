"""Processes, the device mesh, and the few collectives by which ranks agree.

    world = dp_replicate x dp_shard       rank = replica * dp_shard + shard

A replica is a full copy of the model, cut by rows over its ``dp_shard`` ranks. Decisions that every rank must take
alike (stop, give up, go on) are collective here: a rank that acted alone would leave the others waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from liftdist.schema import MeshConfig, UserError

Group = dist.ProcessGroup | None  # None: this process alone

# by their names since torch 2.12, or before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PeerError(RuntimeError):
    """Another rank failed, and reports why; this one only stops with it."""


class Stopped(Exception):
    """All ranks have agreed to stop; the message is the reason. Not an error: nothing is lost."""


@dataclass(frozen=True)
class Mesh:
    device: torch.device
    device_mesh: DeviceMesh  # dims ("dp_replicate", "dp_shard")

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard_mesh(self) -> DeviceMesh:
        return self.device_mesh["dp_shard"]

    @property
    def replicate_group(self) -> Group:
        return self.device_mesh.get_group("dp_replicate") if self.device_mesh.size(0) > 1 else None


@contextmanager
def start(config: MeshConfig) -> Iterator[Mesh]:
    """Join the ranks that torchrun started (or be the only one) and lay them out; leave at the end."""
    if torch.cuda.is_available():
        local_ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local_ranks > gpus:  # known to every rank of the machine, so that none waits for another
            raise UserError(
                f"{local_ranks} ranks on this machine, but {gpus} GPUs are visible; start one rank for each GPU"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    config.layout(int(os.environ.get("WORLD_SIZE", 1)))
    timeout = timedelta(minutes=config.timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        shape = config.layout(dist.get_world_size())
        yield Mesh(device, init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard")))
    except (UserError, Stopped, PeerError):  # all ranks are here; after any other error some may never be
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


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


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; no copy, no autograd."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def row_bounds(rows: int, shards: int) -> tuple[int, ...]:
    """``[shards + 1]`` where each shard's rows begin, dealt as ``torch.chunk`` does: the last shards may hold none."""
    chunk = -(-rows // shards)
    return tuple(min(rows, chunk * shard) for shard in range(shards + 1))


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The rows ``[begin, end)`` of a parameter that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 0
    axis = tensor.placements.index(Shard(0))
    bounds = row_bounds(tensor.shape[0], tensor.device_mesh.size(axis))
    shard = tensor.device_mesh.get_local_rank(axis)
    return bounds[shard], bounds[shard + 1]
