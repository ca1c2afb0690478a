"""Bytes by collective and mesh axis: dense hybrid sharding of FSDP2, gradients reduced in float32, against liftdist.

python -m bench traffic [--ranks 4] [--replicas 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bench import contenders, measure
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh
from liftdist.planning import footprint
from liftdist.schema import Config

#: what operations are called, by what their operators' names begin with
OPERATIONS = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes a rank puts into them, by process group: ``{group: {operation: [calls, bytes]}}``."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: dict[str, dict[str, list[int]]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            group = next(a for a in arguments if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            name = dist.ProcessGroup.unbox(group).group_name
            operation = function.__name__.split(".")[0].strip("_").removesuffix("_")
            sent = arguments[1] if operation in ("reduce_scatter_base", "allgather_base") else arguments[0]
            operation = next((known for start, known in OPERATIONS.items() if operation.startswith(start)), operation)
            tensors = sent if isinstance(sent, list | tuple) else [sent]
            entry = self.by_group.setdefault(name, {}).setdefault(operation, [0, 0])
            entry[0] += 1
            entry[1] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return function(*arguments, **(keywords or {}))


def measured(kind: str, options: argparse.Namespace, config: Config, mesh: Mesh) -> dict[str, dict[str, list[int]]]:
    """Rank 0's collectives in a step, by mesh axis and operation: calls, bytes put in, bytes sent in a ring."""
    contender = contenders.KINDS[kind](contenders.load(options.model, mesh.device), config, mesh)
    batch = next(contenders.batches(contender.model.config.vocab_size, 1, options.length, mesh.device, mesh.rank))
    contender.forward_backward(batch)
    contender.update()  # asks once how many entries the fullest shard has
    traffic = Traffic()
    with traffic:
        contender.forward_backward(batch)
        contender.update()
    axes = {mesh.device_mesh.get_group(axis).group_name: axis for axis in ("dp_replicate", "dp_shard")}
    found: dict[str, dict[str, list[int]]] = {}
    for name, operations in traffic.by_group.items():
        axis = axes.get(name, "world")
        ranks = mesh.device_mesh[axis].size() if axis in axes.values() else mesh.world_size
        for operation, (calls, payload) in operations.items():
            sent = footprint.Collective(axis, operation, calls, payload).sent(ranks)
            found.setdefault(axis, {})[operation] = [calls, payload, sent]
    return found


def main() -> None:
    parser = measure.parser("traffic", __doc__, ranks=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--length", type=int, default=16, help="tokens of the only sequence of a rank")
    options = measure.on_ranks(parser)
    config = measure.config()
    config.mesh.dp_replicate = options.replicas
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        results = {kind: measured(kind, options, config, mesh) for kind in ("hybrid", "liftdist")}
    if os.environ["RANK"] != "0":
        return
    print(f"{options.ranks // options.replicas} shards, {options.replicas} replicas; MB a rank sends in a step")
    totals: dict[str, dict[str, int]] = {}
    for kind, axes in results.items():
        for axis, operations in axes.items():
            totals.setdefault(axis, {})[kind] = sum(sent for _, _, sent in operations.values())
            for operation, (calls, _, sent) in operations.items():
                print(f"{kind:10s} {axis:13s} {operation:15s} {calls:5d} calls {sent / 1e6:12.3f}")
    for axis, of in totals.items():
        if min(of.get("hybrid", 0), of.get("liftdist", 0)) > 1000:
            print(f"{axis}: liftdist sends {of['liftdist'] / of['hybrid']:.3f} of the bytes")
    measure.write({"ranks": options.ranks, "replicas": options.replicas, "results": results}, options.out)


if __name__ == "__main__":
    main()
