"""Bytes per collective and mesh axis: FSDP2's hybrid sharding, with gradients reduced in float32, against liftdist.

python -m bench traffic [--ranks 4] [--replicas 2] [--base-dtype nf4] [--keep-gathered 0] [--out FILE]
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

#: prefix of an operator's name -> name of the operation
OPERATIONS = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}


class Traffic(TorchDispatchMode):
    """Counts collectives and their input bytes on this rank: ``{process group: {operation: [calls, bytes]}}``."""

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
        if function.namespace == "_c10d_functional" and "all_gather" in function.__name__:  # of DTensor
            entry = self.by_group.setdefault(arguments[-1], {}).setdefault("all_gather", [0, 0])
            entry[0] += 1
            entry[1] += arguments[0].nbytes
        return function(*arguments, **(keywords or {}))


def measured(kind: str, options: argparse.Namespace, config: Config, mesh: Mesh) -> dict[str, dict[str, list[int]]]:
    """Collectives of a step on this rank, by mesh axis and operation: calls, input bytes, bytes sent by a ring algorithm."""
    contender = contenders.KINDS[kind](contenders.load(options.model, mesh.device), config, mesh)
    batch = next(contenders.batches(contender.model.config.vocab_size, 1, options.length, mesh.device, mesh.rank))
    contender.forward_backward(batch)
    contender.update()  # the first step also agrees on the size of the sparse exchange
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
    parser.add_argument("--length", type=int, default=16, help="tokens of a rank's only sequence")
    parser.add_argument("--base-dtype", choices=("int8", "fp8", "nf4"), help="model.base_dtype of liftdist's side")
    parser.add_argument("--keep-gathered", type=int, default=0, help="model.keep_gathered of liftdist's side")
    options = measure.on_ranks(parser)
    config = measure.config()
    config.mesh.dp_replicate = options.replicas
    config.model.base_dtype, config.model.keep_gathered = options.base_dtype, options.keep_gathered
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        results = {kind: measured(kind, options, config, mesh) for kind in ("hybrid", "liftdist")}
    if os.environ["RANK"] != "0":
        return
    print(f"{options.ranks // options.replicas} shards, {options.replicas} replicas; MB sent per rank and step")
    totals: dict[str, dict[str, int]] = {}
    for kind, axes in results.items():
        for axis, operations in axes.items():
            totals.setdefault(axis, {})[kind] = sum(sent for _, _, sent in operations.values())
            for operation, (calls, _, sent) in operations.items():
                print(f"{kind:10s} {axis:13s} {operation:15s} {calls:5d} calls {sent / 1e6:12.3f}")
    for axis, sent_by in totals.items():
        if min(sent_by.get("hybrid", 0), sent_by.get("liftdist", 0)) > 1000:
            print(f"{axis}: liftdist sends {sent_by['liftdist'] / sent_by['hybrid']:.3f} of the bytes")
    measure.write({"ranks": options.ranks, "replicas": options.replicas, "results": results}, options.out)


if __name__ == "__main__":
    main()
