"""Memory, traffic and time of a run, before anything is submitted: from the config and the model's ``config.json`` alone.

    config, config.json -> footprint: bytes held, bytes sent -> whether it fits, smallest number of shards, estimated times

Bytes are counted (:mod:`liftdist.planning.footprint`); times are rough estimates from data sheets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from liftdist import config as configs
from liftdist.console import GIB
from liftdist.distributed.sharding import advice_on_padding
from liftdist.engine import selection
from liftdist.errors import UserError
from liftdist.methods.lift import criterion_of
from liftdist.model_settings import SELECTIVE
from liftdist.planning import fit, footprint
from liftdist.planning.fit import Requirements
from liftdist.planning.shapes import Sizes
from liftdist.schema import Config
from liftdist.training import memory
from liftdist.training.memory import USABLE


class Gpu(NamedTuple):
    memory: float  # GiB
    tflops: float = 0.0  # dense bf16; 0 if unknown: no times are estimated
    hbm: float = 0.0  # memory bandwidth, GB/s
    link: float = 0.0  # bandwidth to other GPUs of the node, GB/s per direction


#: From the vendors' data sheets.
GPUS = {
    "a10": Gpu(24, 125, 600, 32),
    "rtx4090": Gpu(24, 165, 1008, 32),
    "l40s": Gpu(48, 362, 864, 32),
    "a100-40": Gpu(40, 312, 1555, 300),
    "a100-80": Gpu(80, 312, 2039, 300),
    "h100": Gpu(80, 989, 3350, 450),
    "h200": Gpu(141, 989, 4800, 450),
    "b200": Gpu(180, 2250, 8000, 900),
    "mi300x": Gpu(192, 1307, 5300, 448),
}
HOST_LINK = 25.0  # bandwidth of a GPU to its host, GB/s per direction: PCIe 4.0 x16
HOST_MEMORY = 100.0  # memory bandwidth of a node's processors, GB/s, as they step the values of all its ranks
EFFICIENCY = 0.4  # fraction of peak FLOP/s in forward and backward
SELECTION_RATE = 1e12  # FLOP/s of a factorisation on a GPU
DISK_RATE = 1e9  # bytes/s that a rank writes
MOST_SHARDS = 4096


def plan(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu: Gpu | None = None,
    link_gbps: float = 100.0,
    others: Sequence[Config] = (),
) -> dict[str, Any]:
    """The requirements of a run of ``config`` on ``nodes`` x ``gpus_per_node`` ranks, in bytes and seconds.

    Args:
        gpu: without one, neither times nor whether the run fits are planned.
        link_gbps: network bandwidth of a node, Gbit/s.
        others: the runs that share the model with this one.

    Raises:
        UserError: as ``liftdist train``, for an invalid mesh layout, model or ``selection.modules``.
    """
    replicas, shards = config.mesh.layout(nodes * gpus_per_node)
    usable = round(USABLE * gpu.memory * GIB) if gpu else None
    if config.train.fit_memory:
        if usable is None:
            raise UserError("train.fit_memory: give the memory that it is to fit, --gpu or --gpu-memory")
        requirements, _ = fit.fitting(config, nodes * gpus_per_node, usable)
    else:
        requirements = Requirements(config)
    config, size = requirements.config, requirements.size

    def memory_of(count: int) -> dict[str, int]:
        return requirements.memory(replicas, count, others)

    parts = memory_of(shards)
    costs = [0.0]
    if config.method == "lift":
        criterion = criterion_of(config.selection)
        costs = [selection.cost_of(criterion, m, n) for m, n in size.trained.values()]
    owners = selection.assign_owners(costs, replicas * shards)
    loads = [0.0] * (replicas * shards)
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    selected = sum(footprint.selected(size, config).values())
    saved = footprint.saved_bytes(config) * selected
    collectives = [
        dataclasses.asdict(one) | {"sent": one.sent(shards if one.axis == "dp_shard" else replicas)}
        for one in footprint.traffic(size, config, replicas, shards)
    ]
    result: dict[str, Any] = {
        "layout": {"nodes": nodes, "gpus_per_node": gpus_per_node, "dp_replicate": replicas, "dp_shard": shards},
        "model": {"parameters": size.numel, "matrices": len(size.trained), "principal": selected},
        "fitted": memory.choice(config) if config.train.fit_memory else None,
        "memory": parts,
        "peak": footprint.peak(parts),
        "usable": usable,
        "fits": None if usable is None else footprint.peak(parts) <= usable,
        "traffic": collectives,
        "checkpoint": {"bytes": saved, "seconds": saved / shards / DISK_RATE},
        "selection": {"matrices": len(costs), "largest": max(costs), "fullest": max(loads), "all": sum(costs)},
        "step": {"tokens": config.train.batch_size * config.data.max_length},
        "smallest": None,
        "advice": None,
        "padding": advice_on_padding((shape for unit in size.units for shape in unit.shapes), replicas, shards),
    }
    if gpu is not None and usable is not None:
        if gpu.tflops:
            result["selection"]["seconds"] = max(loads) / SELECTION_RATE
            result["step"] |= _times(size, config, gpu, link_gbps / 8, nodes, result)
        fitting = (count for count in _shard_counts(gpus_per_node) if footprint.peak(memory_of(count)) <= usable)
        result["smallest"] = next(fitting, None)
        if not result["fits"]:
            minimum = None
            if result["smallest"] is None:  # experts are padded where there are more shards than of them
                minimum = min(footprint.peak(memory_of(count)) for count in _shard_counts(gpus_per_node))
            result["advice"] = _advice(config, footprint.rows(config, replicas * shards), result, minimum)
    return result


def _shard_counts(gpus_per_node: int) -> Iterator[int]:
    """Candidate numbers of shards, ascending: part of a node, then whole nodes, doubling."""
    yield from range(1, gpus_per_node)
    while gpus_per_node <= MOST_SHARDS:
        yield gpus_per_node
        gpus_per_node *= 2


def _times(size: Sizes, config: Config, gpu: Gpu, link: float, nodes: int, result: dict[str, Any]) -> dict[str, float]:
    """Estimated seconds of a step: compute at ``EFFICIENCY``, overlapped with the collectives inside a replica."""
    layout = result["layout"]
    ranks = layout["dp_replicate"] * layout["dp_shard"]
    share = (
        footprint.recomputed(size, config) / len(size.layers)
        if config.model.activation_checkpointing != SELECTIVE
        else 0
    )
    recomputed = 2 * share * (size.numel - size.towers.numel)
    tokens = result["step"]["tokens"]
    compute = tokens * (footprint.operations(size, config) + recomputed) / (ranks * EFFICIENCY * gpu.tflops * 1e12)
    inside = layout["gpus_per_node"] % layout["dp_shard"] == 0
    rates = {
        "dp_shard": gpu.link if inside else link,
        "dp_replicate": link / min(layout["dp_shard"], layout["gpus_per_node"]) if nodes > 1 else gpu.link,
        "host": HOST_LINK,
    }
    taken = dict.fromkeys(rates, 0.0)
    for one in result["traffic"]:
        taken[one["axis"]] += one["sent"] / (rates[one["axis"]] * 1e9)
    sent = 2 * footprint.micro_batches(config, ranks) * result["memory"].get(footprint.OFFLOADED, 0)  # there and back
    taken["host"] += sent / (HOST_LINK * 1e9)
    stepping = HOST_MEMORY / layout["gpus_per_node"] if config.optimizer.device == "cpu" else gpu.hbm
    update = 60 * result["model"]["principal"] / layout["dp_shard"] / (stepping * 1e9)  # bytes read and written
    seconds = max(compute, taken["dp_shard"]) + taken["dp_replicate"] + taken["host"] + update
    return {
        "seconds": seconds,
        "computing": compute,
        "dp_shard": taken["dp_shard"],
        "dp_replicate": taken["dp_replicate"],
        "host": taken["host"],
        "updating": update,
        "tokens_per_second": tokens / seconds,
    }


def check_fits(config: Config, nodes: int, gpus_per_node: int) -> None:
    """Raises ``UserError`` if ``slurm.gpu_memory`` is set and the run does not fit in it."""
    if config.slurm.gpu_memory is None:
        return
    parts = (config.model, config.data, config.selection, config.lora, config.optimizer, config.train, config.mesh)
    decisive = (config.method, *parts, config.slurm.gpu_memory)
    if (key := repr((decisive, nodes, gpus_per_node))) in _known_to_fit:  # checked for another task of an array
        return
    found = plan(config, nodes, gpus_per_node, Gpu(config.slurm.gpu_memory))
    if not found["fits"]:
        raise UserError(f"slurm.gpu_memory={config.slurm.gpu_memory:g}: {_verdict(found)}")
    _known_to_fit.add(key)


_known_to_fit: set[str] = set()


def _advice(config: Config, rows: int, found: dict[str, Any], minimum: int | None) -> str:
    """How to make a run fit. ``minimum``: bytes that a rank needs however many shards there are; None if more shards help."""
    if minimum is None:
        nodes = -(-found["smallest"] // found["layout"]["gpus_per_node"])
        also = found["peak"] - found["memory"].get("principal", 0) <= found["usable"]
        needed = f"it needs {found['smallest']} shards" + (f", {nodes} nodes" if nodes > 1 else "")
        return needed + (", or optimizer.device=cpu" if also else "")
    ways = config.model.lighter()
    ways += ["lower train.micro_batch_size"] if rows > 1 else []
    ways += ["lower data.max_length"]
    if found["memory"]["root, whole"] + found["memory"]["first all-gather buffers"] > found["usable"]:
        ways = []  # independent of the batch
    ways += ["use GPUs with more memory"]
    return f"it needs at least {_gib(minimum)} on any number of shards: {', or '.join(ways)}"


def _verdict(found: dict[str, Any]) -> str:
    figures = f"{_gib(found['peak'])} of {_gib(found['usable'])}"
    if found["fits"]:
        return f"fits: {figures}"
    return f"does not fit: {figures} on {found['layout']['dp_shard']} shards; {found['advice']}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def run(options: argparse.Namespace) -> tuple[Iterable[str], bool]:
    """The lines of a plan, and False if the run is known not to fit. Raises ``UserError``."""
    runs = [config for config, _ in configs.load_runs(options.config, options.overrides)]
    config = runs[0]
    nodes = config.slurm.nodes if options.nodes is None else options.nodes
    gpus_per_node = options.gpus_per_node
    if gpus_per_node is None:
        gpus_per_node = config.slurm.ranks_per_node or config.slurm.gpus_per_node or 8
    given = {"--nodes": nodes, "--gpus-per-node": gpus_per_node, "--link-gbps": options.link_gbps}
    given |= {} if options.gpu_memory is None else {"--gpu-memory": options.gpu_memory}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be above 0, got {value}")
    if options.gpu and options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}: must be one of {', '.join(GPUS)}; or give --gpu-memory")
    gpu = GPUS[options.gpu] if options.gpu else None
    gib = config.slurm.gpu_memory if options.gpu_memory is None and gpu is None else options.gpu_memory
    if gib is not None:
        gpu = (gpu or Gpu(gib))._replace(memory=gib)
    plans = [
        plan(one, nodes, gpus_per_node, gpu, options.link_gbps, [other for other in runs if other is not one])
        for one in runs
    ]
    found = max(plans, key=lambda found: footprint.peak(found["memory"]))  # while this run has its turn
    return [json.dumps(found, indent=2)] if options.json else describe(found), found["fits"] is not False


def describe(found: dict[str, Any]) -> Iterator[str]:
    """A plan as lines of text."""
    layout, model, step = found["layout"], found["model"], found["step"]
    yield (
        f"{layout['nodes']} x {layout['gpus_per_node']} ranks: {layout['dp_replicate']} replicas of {layout['dp_shard']} shards"
    )
    if found["padding"]:
        yield found["padding"]
    counts = model["parameters"] / 1e9, model["principal"] / 1e6, model["matrices"]
    yield "{:.2f} G parameters, {:.1f} M trained in {} matrices".format(*counts)
    if found["fitted"]:
        yield fit.described(found["fitted"])
    yield "memory of the fullest rank"
    for name, size in found["memory"].items():
        notes = {
            footprint.ON_HOST: "not part of the peak",
            footprint.OFFLOADED: "not part of the peak",
            "base values": "at first; a refresh adds those of weights that were not selected before",
            "other variants": "of each run besides the one whose turn takes most, which is planned here",
            "first all-gather buffers": "in the first forward, instead of the lines below",
            "reducing": "instead of layers and computing",
            "loss": "instead of layers and computing",
            "selecting": "instead of root and the lines below it",
        }
        note = f"   {notes[name]}" if name in notes else ""
        yield f"  {name:24s}{_gib(size):>12s}{note}"
    yield f"  {'peak':24s}{_gib(found['peak']):>12s}"
    if found["fits"] is not None:
        yield _verdict(found)
    yield "sent by a rank in a step"
    for one in found["traffic"]:
        yield f"  {one['axis']:13s} {one['operation']:15s}{_gib(one['sent']):>12s}   {one['calls']} calls"
    if "seconds" in step:
        yield (
            f"step     {step['seconds']:.2f} s, {step['tokens_per_second']:,.0f} tokens/s: computing {step['computing']:.2f} s, "
            f"overlapped with shards {step['dp_shard']:.2f} s; replicas {step['dp_replicate']:.2f} s, "
            + (f"host {step['host']:.2f} s, " if step["host"] else "")
            + f"update {step['updating']:.3f} s"
        )
        if found["selection"]["all"]:
            yield f"select   about {found['selection']['seconds']:.0f} s"
    yield f"save     {_gib(found['checkpoint']['bytes'])}, {found['checkpoint']['seconds']:.1f} s"
