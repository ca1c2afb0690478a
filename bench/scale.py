"""One whole step of large models on simulated ranks: collectives and memory, against the planner's.

python -m bench scale [--models 8b 70b 405b] [--ranks 8 64 1024] [--length 2048] [--out FILE]

One process is rank 0 of a process group of torch's ``fake`` backend, and works on fake tensors, which have shapes but no memory.
Everything else is the real code: reading, sharding, hooks, collectives, optimizer. Indices are spread evenly, as the planner
assumes.
"""

from __future__ import annotations

import argparse
import time
import unittest.mock
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from bench import measure
from bench.traffic import Traffic
from liftdist.console import Console
from liftdist.distributed.mesh import Mesh
from liftdist.distributed.sharding import fsdp_modules
from liftdist.engine import bits, quantised, selection
from liftdist.engine.base_values import BaseValues
from liftdist.engine.criteria import low_rank
from liftdist.engine.matrices import principal_matrices
from liftdist.engine.principal import PrincipalWeights
from liftdist.methods.full import Full
from liftdist.methods.lift import Lift, rules
from liftdist.models import build, head, names
from liftdist.models.fill import fill
from liftdist.models.load import shard
from liftdist.planning import activations, footprint, shapes
from liftdist.planning.live_bytes import LiveBytes
from liftdist.registry import LOSSES, METHODS
from liftdist.runs.context import RunContext
from liftdist.schema import Config

LLAMA = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False)
FEW = 64  # bytes per call; smaller collectives carry scalars, such as a norm or a count, and are not compared
MODELS = {
    "8b": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70b": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "mixtral-8x7b": dict(
        model_type="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "deepseek-v3": dict(model_type="deepseek_v3"),
    "405b": dict(LLAMA, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}


class Folder:
    """Replaces the weight files of a model, and counts the bytes that are read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.bytes_read = 0
        self._tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in build.tensors(model).items()}

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        shape, dtype = self._tensors[name]
        rows = torch.empty((end - begin, *(shape[-1:] if len(shape) > 1 else ())), dtype=dtype)
        self.bytes_read += rows.nbytes
        return rows


def settings(
    ranks: int,
    replicas: int,
    density: float = 0.05,
    base_dtype: str | None = None,
    on_host: bool = False,
    keep_gathered: int = 0,
    length: int = 2048,
    **mesh,
) -> Config:
    """The config of a step: two micro-batches per rank, each of one sequence of ``length`` tokens."""
    config = measure.config()
    config.optimizer.device = "cpu" if on_host else None
    config.model.base_dtype, config.model.keep_gathered = base_dtype, keep_gathered
    config.selection.density = density
    config.data.max_length = length
    config.train.micro_batch_size, config.train.batch_size = 1, 2 * ranks
    config.model.activation_checkpointing = True
    config.mesh.dp_replicate = replicas
    for key, value in mesh.items():
        setattr(config.mesh, key, value)
    return config


def config_of(shape: dict) -> Any:
    """The configuration of a model, by default a Llama."""
    return AutoConfig.for_model(**({"model_type": "llama"} | shape))


def step(shape: dict, config: Config, ranks: int) -> dict:
    """Measured and planned on rank 0 in one step: bytes read, collectives by axis, and peak of live bytes."""
    replicas, shards = config.mesh.layout(ranks)
    hf_config, loss = config_of(shape), LOSSES.load(config.train.loss).make(config.train)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        device_mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))
        mesh = Mesh(torch.device("cpu"), device_mesh)
        model = build.build(hf_config, config.model)
        chosen, folder, stored = METHODS.load(config.method), Folder(model), names.same(build.tensors(model))
        chosen.extend(config, model)
        size = shapes.sizes(model, config)
        stored = chosen.prepare(config, model, stored)
        shard(model, config.model, mesh)
        live, traffic = LiveBytes(), Traffic()
        with FakeTensorMode(allow_non_fake_inputs=True), activations.packing_known(config.data.packing), live:
            if config.model.base_dtype is not None:
                matrices = {place.param for place in principal_matrices(model).values()}
                quantised.quantise(fsdp_modules(model), matrices, config.model.base_dtype, mesh.device)
            model.to_empty(device="cpu")
            fill(model, folder, stored, lambda: None)
            model.train()
            method = _lift(config, mesh, model) if config.method == "lift" else _dense(config, mesh, model, stored)
            head.in_chunks(model)
            tokens = torch.zeros((config.train.micro_batch_size, config.data.max_length), dtype=torch.int64)
            places = torch.arange(config.data.max_length)
            method.optimizer.step()  # creates its state
            method.skip()
            live.peak = live.now
            method.before_step(1, 1000)
            with traffic:
                for _ in range(footprint.micro_batches(config, ranks)):
                    base = None
                    if loss.needs_base:
                        with method.at_base(), torch.no_grad():
                            base = model.hidden_at(tokens, None, places)
                    model.chunked_loss(tokens, None, places, tokens, loss.per_token, base=base).backward()
                method.reduce(torch.ones(()))
                method.clip()
                method.step()
            on_host = _on_host(method)
        groups = {device_mesh.get_group(axis).group_name: axis for axis in ("dp_replicate", "dp_shard")}
        measured = {
            f"{groups[name]} {operation}": counts
            for name, found in traffic.by_group.items()
            for operation, counts in found.items()
            if counts[1] > FEW * counts[0]
        }
    finally:
        dist.destroy_process_group()
    planned_collectives: dict[str, list[int]] = {}
    for one in footprint.traffic(size, config, replicas, shards):
        if one.axis == "host":
            continue
        counts = planned_collectives.setdefault(f"{one.axis} {one.operation}", [0, 0])
        counts[0] += one.calls
        counts[1] += one.payload
    planned = footprint.memory(
        size, config, shards, activations.activations(hf_config, config, footprint.rows(config, ranks))
    )
    return {
        "read": folder.bytes_read,
        "planned_read": size.itemsize * sum(unit.padded(shards) for unit in size.units) + size.buffers,
        "collectives": measured,
        "planned_collectives": planned_collectives,
        "peak": live.peak - on_host,
        "planned_peak": footprint.peak(planned | {"selecting": 0, "previously selected": 0}),
    }


def _lift(config: Config, mesh: Mesh, model: Any) -> Lift:
    def lay_out(params: Any, positions: Any, group: Any) -> None:  # noqa: ARG001
        """In place of :func:`quantised.make_exact`, which looks at positions, and agrees with other ranks."""
        for param, where in zip(params, positions, strict=True):
            if (rows := quantised.held_by(param)) is not None:
                gaps, none = torch.zeros(where.numel(), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
                rows._added = gaps, none, torch.zeros(where.numel(), dtype=rows.dtype)
                rows._last = where, bits.pack(torch.ones(where.numel(), dtype=torch.bool))
                rows.lay_out(where.numel())

    def add(self: Any, parts: Any) -> None:
        """In place of :meth:`BaseValues.add`, which looks at positions."""
        self._positions = [part.positions.clone() for part in parts]
        self._values = [part.read(part.positions) for part in parts]

    patched = unittest.mock.patch.object
    with patched(quantised, "make_exact", lay_out), patched(BaseValues, "add", add):
        principal = _principal(config, mesh, model)
    for reduction in [part.reduction for part in principal.parts]:
        if reduction is not None:  # real ranks agree on it by a collective
            reduction._width = sum(indices.numel() for indices in reduction._indices.values())
    return Lift(config, principal)


def _principal(config: Config, mesh: Mesh, model: Any) -> PrincipalWeights:
    return PrincipalWeights(
        model,
        budget=rules(config.selection)[1],
        modules=config.selection.modules,
        replicate_group=mesh.replicate_group,
        initial_indices=lambda principal: [
            torch.zeros(footprint.held(matrix.place, count, mesh.device_mesh.size(1)), dtype=torch.int32)
            for matrix, count in zip(principal.matrices, principal.counts, strict=True)
        ],
        sparse_reduce_scatter=config.mesh.sparse_reduce_scatter,
        device=config.optimizer.device,
        keep_base=config.keeps_base,
    )


def _on_host(method: Any) -> int:
    """Bytes of what is on the host, which is counted as the rest is: all tensors here are of one device."""
    if not isinstance(method, Lift) or not method.principal.is_on_host:
        return 0
    principal = method.principal
    states = (state for state in method.optimizer.state[principal.values].values() if state.ndim)
    parts = (part.kept for part in principal.parts)
    return sum(tensor.nbytes for tensor in (principal.values, principal.values.grad, *states, *parts))


def _dense(config: Config, mesh: Mesh, model: Any, stored: names.NameMap) -> Full:
    context = RunContext(config, mesh, Console(False))
    method: Full = METHODS.load(config.method).attach(context, model, stored, "", from_checkpoint=True)
    for value in method.dense.values:
        value.grad = torch.zeros_like(value)
    return method


def balance(shape: dict, ranks: int) -> dict[str, float]:
    """Load balance of the factorisation: the largest load of a rank over max(mean load, largest matrix)."""
    size = shapes.sizes(build.build(config_of(shape), Config(run_dir="none").model), Config(run_dir="none"))
    costs = [low_rank.cost(m, n, 64, "fast") for m, n in size.trained.values()]
    loads = [0.0] * ranks
    for cost, owner in zip(costs, selection.assign_owners(costs, ranks), strict=True):
        loads[owner] += cost
    return {"matrices_a_rank": len(costs) / ranks, "ratio": max(loads) / max(sum(costs) / ranks, max(costs))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--base-dtype", choices=("int8", "fp8", "nf4"), help="as model.base_dtype")
    parser.add_argument("--on-host", action="store_true", help="as optimizer.device=cpu")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results = {}
    for name in options.models:
        for ranks in options.ranks:
            for replicas in (1, ranks // 8) if ranks > 8 else (1,):
                began = time.perf_counter()
                found = step(
                    MODELS[name],
                    settings(
                        ranks,
                        replicas,
                        base_dtype=options.base_dtype,
                        on_host=options.on_host,
                        length=options.length,
                    ),
                    ranks,
                )
                took = time.perf_counter() - began
                key = f"{name}, {replicas} x {ranks // replicas}"
                results[key] = found | {"balance": balance(MODELS[name], ranks)}
                exact = all(found[key] == found[f"planned_{key}"] for key in ("read", "collectives"))
                verdict = "as planned" if exact else "NOT AS PLANNED"
                print(
                    f"{key:16s} peak {found['peak'] / 2**30:8.2f} GiB, planned {found['planned_peak'] / 2**30:8.2f}; "
                    f"reads and collectives {verdict}; fullest owner {results[key]['balance']['ratio']:.3f} ({took:.0f} s)",
                    flush=True,
                )
    measure.write({"results": results}, options.out)


if __name__ == "__main__":
    main()
