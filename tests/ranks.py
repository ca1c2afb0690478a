"""Real ranks on one machine: processes that meet through a file store and talk over gloo.

``run(world_size, function, *arguments)`` calls ``function(mesh, *arguments)`` on every rank and returns what the ranks
returned, by rank. They are forked from a server that has imported torch and transformers already.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from liftdist.distributed.mesh import Mesh

#: What ranks use, and pandas, which pyarrow imports where samples are written.
PRELOADED = ["liftdist.training.run", "liftdist.evaluation.evaluate", "liftdist.methods.lift", "pandas"]


def run(
    world_size: int, function: Callable[..., Any], *arguments: Any, dp_replicate: int = 1, timeout: float = 240
) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank, args=(rank, world_size, dp_replicate, folder, function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for rank, process in enumerate(processes):
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"rank {rank} of {world_size} did not finish within {timeout} s")
        results, failures = [], []
        for rank in range(world_size):
            file = Path(folder) / f"result-{rank}.pt"
            if not file.exists():
                raise RuntimeError(f"rank {rank} of {world_size} died without a word")
            ok, value = torch.load(file, weights_only=True)
            results.append(value)
            if not ok:
                failures.append(f"rank {rank} of {world_size}:\n{value}")
        if failures:  # the first that did not merely lose its peer
            raise AssertionError(min(failures, key=lambda failure: "Connection closed by peer" in failure))
    return results


def _rank(rank: int, world_size: int, dp_replicate: int, folder: str, function: Callable, arguments: tuple) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        shape = (dp_replicate, world_size // dp_replicate)
        mesh = Mesh(torch.device("cpu"), init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard")))
        outcome = (True, function(mesh, *arguments))
    except Exception:
        outcome = (False, traceback.format_exc())
    torch.save(outcome, f"{folder}/result-{rank}.pt")
    dist.destroy_process_group()
