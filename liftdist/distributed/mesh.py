"""The processes of a run and their device mesh.

    world = dp_replicate x dp_shard       rank = replica * dp_shard + shard

A replica is a full copy of the model, sharded by rows over its ``dp_shard`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from liftdist import environment
from liftdist.distributed.collectives import Group
from liftdist.errors import PeerError, Stopped, UserError


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
def start(layout: Callable[[int], tuple[int, int]], timeout: timedelta) -> Iterator[Mesh]:
    """Initialise the process group of the ranks that torchrun started, or of this process alone; destroy it at the end.

    Args:
        layout: maps the number of ranks to ``(dp_replicate, dp_shard)``; raises ``UserError`` if there is no such layout.
        timeout: a collective that takes longer aborts the job.

    Raises:
        UserError: this machine has fewer GPUs than ranks, or ``layout`` raised it.
    """
    if torch.cuda.is_available():
        local_ranks, gpus = environment.LOCAL_WORLD_SIZE.get(1), torch.cuda.device_count()
        if local_ranks > gpus:  # the same on every rank of the machine, so that none waits for another
            raise UserError(
                f"{local_ranks} ranks on this machine, but {gpus} GPUs are visible; start one rank for each GPU"
            )
        device = torch.device("cuda", environment.LOCAL_RANK.get(0))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    layout(environment.WORLD_SIZE.get(1))
    if environment.RANK.is_set():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        shape = layout(dist.get_world_size())
        yield Mesh(device, init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard")))
    except (UserError, Stopped, PeerError):  # raised on all ranks; after other errors some ranks may be missing
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
