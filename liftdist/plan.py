"""Memory, traffic and time of a run, before anything is submitted: from the config and the model's ``config.json`` alone.

For S shards, R replicas, P parameters of which N are trained, density d, all on the fullest rank:

    weights      2 P / S                            and the root whole: embedding, head, norm
    principal    20 d N / S                         values, gradient, two moments 16 B; indices 4 B
    once principal  N / (8 S)                       a bit, from the first refresh on
    layers       one layer gathered, and of one more its gradient, in bf16 and as float32 to be reduced
    activations  what one layer keeps for its backward, times layers; found by running two layers on fake tensors

What travels is counted as a ring sends it: all-gather and reduce-scatter of n bytes n (S - 1) / S, all-reduce twice that.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel, masking_utils

from liftdist import config as configs
from liftdist import loss, lowrank, selection
from liftdist import model as models
from liftdist.config import Config, UserError
from liftdist.memory import LiveBytes
from liftdist.mesh import row_bounds
from liftdist.principal import principal_parameters

GIB = 2**30


class Gpu(NamedTuple):
    memory: float  # GiB
    tflops: float = 0.0  # dense bf16; 0: not known, and nothing is said of time
    hbm: float = 0.0  # GB/s of its memory
    link: float = 0.0  # GB/s each way to its neighbours in a node


#: By the vendors' data sheets.
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
USABLE = 0.92  # of a GPU's memory: the rest is its context, NCCL, and what the allocator cannot place
EFFICIENCY = 0.4  # of the peak, for products in forward and backward
SELECTION_RATE = 1e12  # operations a second of a factorisation, on a GPU
DISK_RATE = 1e9  # bytes a second that a rank writes
MOST_SHARDS = 4096


@dataclass(frozen=True)
class Unit:
    """An FSDP module: what is gathered and reduced together."""

    shapes: tuple[tuple[int, ...], ...]  # of all parameters
    trained: tuple[tuple[int, int], ...]  # of the trained matrices

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def trained_numel(self) -> int:
        return sum(m * n for m, n in self.trained)

    def padded(self, shards: int, trained: bool = False) -> int:
        """Weights that the fullest shard holds, and that every shard is padded to."""
        shapes = self.trained if trained else self.shapes
        return sum(row_bounds(shape[0], shards)[1] * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Sizes:
    """A model as the planner sees it."""

    layers: tuple[Unit, ...]
    root: Unit
    itemsize: int  # bytes of a weight
    hidden: int
    vocabulary: int
    query: int  # attention's width: heads x head dim

    @property
    def numel(self) -> int:
        return self.root.numel + sum(layer.numel for layer in self.layers)

    @property
    def trained(self) -> list[tuple[int, int]]:
        return [shape for unit in self.units for shape in unit.trained]

    @property
    def units(self) -> tuple[Unit, ...]:
        return *self.layers, self.root


def sizes(model: PreTrainedModel, patterns: Sequence[str]) -> Sizes:
    """Of a model that needs no memory. Raises ``UserError``: no module fits the patterns."""
    trained = {id(param) for param in principal_parameters(model, patterns).values()}

    def unit(params: Iterator[nn.Parameter]) -> Unit:
        unique = list({id(param): param for param in params}.values())
        chosen = [(p.shape[0], p.shape[1]) for p in unique if id(p) in trained]
        return Unit(tuple(tuple(p.shape) for p in unique), tuple(chosen))

    layers = models.decoder_layers(model)
    inside = {id(param) for param in layers.parameters()}
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        tuple(unit(layer.parameters()) for layer in layers),
        unit(param for param in model.parameters() if id(param) not in inside),
        next(model.parameters()).element_size(),
        text.hidden_size,
        text.vocab_size,
        width * text.num_attention_heads,
    )


class Activations(NamedTuple):
    """Bytes that a micro-batch keeps alive."""

    fixed: int  # whatever the number of layers
    layer: int  # for each layer, from its forward to its backward
    loss: int  # besides, while the loss is computed
    backward: int  # besides, while one layer's backward runs


def activations(hf_config: Any, config: Config, ranks: int) -> Activations:
    """Of the real model with one and two layers, run forward and backward on tensors that hold no memory.

    With the attention that transformers chooses: others keep about as much.
    """
    settings = dataclasses.replace(config.model, attn_implementation=None)
    rows = min(config.train.micro_batch_size, sequences(config, ranks))
    kept, losses, backwards = [], [], []
    for layers in (1, 2):
        live = LiveBytes()
        with FakeTensorMode(allow_non_fake_inputs=True), packing_known(config.data.packing), live:
            model = models.build(_with_layers(hf_config, layers), settings).to_empty(device="cpu").train()
            models.recompute(model, config.model)
            trained = {id(param) for param in principal_parameters(model, config.selection.modules).values()}
            for param in model.parameters():
                param.requires_grad_(id(param) in trained)
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            shape = (rows, config.data.max_length)
            tokens = torch.zeros(shape, dtype=torch.int64)
            before = live.peak = live.now
            loss.in_chunks(model)
            total = model.chunked_loss(tokens, None, torch.arange(shape[1]), tokens)
            kept.append(live.now - before)
            losses.append(live.peak - live.now)
            live.peak = live.now
            total.backward()
            backwards.append(live.peak - before - kept[-1])
    layer = kept[1] - kept[0]
    return Activations(kept[0] - layer, layer, losses[1], backwards[1])


def packing_known(packing: bool) -> contextlib.AbstractContextManager:
    """On tensors without contents transformers takes all samples for packed, and makes a mask of all pairs of tokens."""
    if packing:
        return contextlib.nullcontext()
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)


def _with_layers(hf_config: Any, layers: int) -> Any:
    shallow = copy.deepcopy(hf_config)
    text = shallow.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    return shallow


# ---------------------------------------------------------------------------------------------------------------------
# What a rank holds and sends.


def memory(size: Sizes, config: Config, shards: int, kept: Activations) -> dict[str, int]:
    """Bytes by component, on the fullest rank."""
    gathered = size.itemsize * max(layer.padded(shards) * shards for layer in size.layers)
    reduced = max(unit.padded(shards, trained=True) * shards for unit in size.units)
    whole = max(m * n for m, n in size.trained)
    choice = config.selection
    selected = _selected(size, config)
    factoring = max(
        lowrank.workspace(m, n, count, choice.filter_rank, choice.method)
        for (m, n), count in zip(size.trained, selected, strict=True)
    )
    exchanged = max(16 * shards * _width(unit, config, shards) for unit in size.units) if shards > 1 else 0
    return {
        "weights": size.itemsize * sum(unit.padded(shards) for unit in size.units),
        "principal": 20 * sum(-(-count // shards) for count in selected),
        "once principal": sum(unit.padded(shards, trained=True) for unit in size.units) // 8
        if config.selection.refresh_interval
        else 0,
        "root, whole": size.itemsize * size.root.padded(shards) * shards,
        # the next layer is gathered while one is computed; that one is gone when its gradients are copied to be reduced
        "layers, whole": gathered
        + max(gathered + size.itemsize * reduced, (size.itemsize + 4) * reduced + 4 * reduced // shards + exchanged),
        "activations": kept.fixed + len(size.layers) * kept.layer,
        "computing": kept.backward,
        "loss": kept.loss,
        # this matrix and the next as gathered, and the rows sent for that
        "selecting": (3 * size.itemsize * whole if shards > 1 else 0) + factoring,
    }


def peak(parts: dict[str, int]) -> int:
    """Bytes at the worst moment of a run: training, or selecting."""
    held = parts["weights"] + parts["principal"] + parts["once principal"]
    backward = parts["layers, whole"] + parts["computing"]
    training = parts["root, whole"] + parts["activations"] + max(backward, parts["loss"])
    gathering = 2 * parts["root, whole"]  # at the beginning: as it arrived, and as it is used
    return held + max(training, gathering, parts["selecting"])


def _selected(size: Sizes, config: Config) -> list[int]:
    choice = config.selection
    return [selection.budget(shape, choice.density, choice.budget_rank) for shape in size.trained]


@dataclass(frozen=True)
class Collective:
    """Of one kind, over one axis of the mesh, in one optimizer step."""

    axis: str
    operation: str
    calls: int
    payload: int  # bytes a rank gives to all calls together: its part of an all-gather, the whole of what is reduced

    def sent(self, ranks: int) -> int:
        """Bytes that a rank sends in a ring."""
        per_payload = {
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
            "all_reduce": 2 * (ranks - 1) / ranks,
        }
        return round(self.payload * per_payload[self.operation])


def traffic(size: Sizes, config: Config, replicas: int, shards: int) -> list[Collective]:
    """Collectives of one optimizer step, but for a few numbers."""
    micro = micro_batches(config, replicas * shards)
    found = []
    if shards > 1:
        layers, root = (
            size.itemsize * sum(layer.padded(shards) for layer in size.layers),
            size.itemsize * size.root.padded(shards),
        )
        count = len(size.layers)
        found.append(Collective("dp_shard", "all_gather", micro * (2 * count + 1), micro * (2 * layers + root)))
        reduced = [unit for unit in size.units if unit.trained]
        widths = [_width(unit, config, shards) for unit in reduced]
        dense = [4 * shards * unit.padded(shards, trained=True) for unit in reduced]
        sparse = [config.mesh.sparse_reduce_scatter and 8 * w < d // shards for w, d in zip(widths, dense, strict=True)]
        where = sum(4 * width for width, chosen in zip(widths, sparse, strict=True) if chosen)
        what = sum(4 * shards * w if chosen else d for w, d, chosen in zip(widths, dense, sparse, strict=True))
        if any(sparse):
            found.append(Collective("dp_shard", "all_gather", micro * sum(sparse), micro * where))
        found.append(Collective("dp_shard", "reduce_scatter", micro * len(reduced), micro * what))
    if replicas > 1:
        flat = 4 * sum(-(-selected // shards) for selected in _selected(size, config))
        found.append(Collective("dp_replicate", "all_reduce", 1, flat))
    return found


def _width(layer: Unit, config: Config, shards: int) -> int:
    """Principal weights of a layer that a shard holds, if they are spread evenly."""
    choice = config.selection
    return sum(-(-selection.budget(s, choice.density, choice.budget_rank) // shards) for s in layer.trained)


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches of the rank that has the most sequences of a step."""
    return math.ceil(sequences(config, ranks) / config.train.micro_batch_size)


def sequences(config: Config, ranks: int) -> int:
    """Sequences of a step for the rank that has most."""
    return math.ceil(config.train.batch_size / ranks)


def operations(size: Sizes, config: Config) -> int:
    """Floating-point operations of a token in forward and backward, without what is computed twice."""
    linear = size.numel - math.prod(size.root.shapes[0])  # an embedding is looked up
    tied = sum(len(shape) == 2 for shape in size.root.shapes) == 1
    head = size.hidden * size.vocabulary
    products = linear + (head if tied else 0)
    trained = sum(m * n for m, n in size.trained)
    attention = 2 * len(size.layers) * size.query * config.data.max_length  # causal: half of all pairs, two products
    return 2 * (2 * products + trained) + 3 * attention


# ---------------------------------------------------------------------------------------------------------------------
# The plan.


def plan(
    config: Config, nodes: int, gpus_per_node: int, gpu: Gpu | None = None, link_gbps: float = 100.0
) -> dict[str, Any]:
    """What a run of ``config`` needs on ``nodes`` x ``gpus_per_node`` ranks; bytes, seconds.

    Args:
        gpu: what it runs on; without one nothing is said of time, and of whether it fits.
        link_gbps: Gbit/s of a node's network.

    Raises:
        UserError: as ``liftdist train``: a layout, a model or patterns that do not fit.
    """
    replicas, shards = config.mesh.layout(nodes * gpus_per_node)
    hf_config = _hf_config(config)
    size = sizes(models.build(hf_config, config.model), config.selection.modules)
    probes: dict[int, Activations] = {}

    def memory_of(count: int) -> dict[str, int]:
        ranks = replicas * count
        rows = min(config.train.micro_batch_size, sequences(config, ranks))
        if rows not in probes:
            probes[rows] = activations(hf_config, config, ranks)
        return memory(size, config, count, probes[rows])

    parts = memory_of(shards)
    usable = round(USABLE * gpu.memory * GIB) if gpu else None
    costs = [lowrank.cost(m, n, config.selection.filter_rank, config.selection.method) for m, n in size.trained]
    owners = selection.deal(costs, replicas * shards)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in set(owners)]
    selected = sum(_selected(size, config))
    travels = [
        dataclasses.asdict(one) | {"sent": one.sent(shards if one.axis == "dp_shard" else replicas)}
        for one in traffic(size, config, replicas, shards)
    ]
    result: dict[str, Any] = {
        "layout": {"nodes": nodes, "gpus_per_node": gpus_per_node, "dp_replicate": replicas, "dp_shard": shards},
        "model": {"parameters": size.numel, "matrices": len(size.trained), "principal": selected},
        "memory": parts,
        "peak": peak(parts),
        "usable": usable,
        "fits": None if usable is None else peak(parts) <= usable,
        "traffic": travels,
        "checkpoint": {"bytes": 16 * selected, "seconds": 16 * selected / shards / DISK_RATE},
        "selection": {"matrices": len(costs), "largest": max(costs), "fullest": max(loads), "all": sum(costs)},
        "step": {"tokens": config.train.batch_size * config.data.max_length},
        "smallest": None,
    }
    if gpu is not None and usable is not None:
        if gpu.tflops:
            result["selection"]["seconds"] = max(loads) / SELECTION_RATE
            result["step"] |= _times(size, config, gpu, link_gbps / 8, nodes, result)
        fitting = (count for count in _shard_counts(gpus_per_node) if peak(memory_of(count)) <= usable)
        result["smallest"] = next(fitting, None)
    return result


def _hf_config(config: Config) -> Any:
    folder = Path(config.model.path).expanduser()
    if folder.is_dir():
        return models.check_type(folder, config.model)
    try:
        return AutoConfig.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # the library raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.path {config.model.path}: {reason}") from None


def _shard_counts(gpus_per_node: int) -> Iterator[int]:
    """Ranks of one replica, from few to many: some of a node, or whole nodes, twice as many each time."""
    yield from range(1, gpus_per_node)
    while gpus_per_node <= MOST_SHARDS:
        yield gpus_per_node
        gpus_per_node *= 2


def _times(size: Sizes, config: Config, gpu: Gpu, link: float, nodes: int, result: dict[str, Any]) -> dict[str, float]:
    """Rough: the ranks of a step compute at ``EFFICIENCY``, and gather and reduce meanwhile."""
    layout = result["layout"]
    ranks = layout["dp_replicate"] * layout["dp_shard"]
    recomputed = 2 * size.numel if config.model.activation_checkpointing else 0
    tokens = result["step"]["tokens"]
    compute = tokens * (operations(size, config) + recomputed) / (ranks * EFFICIENCY * gpu.tflops * 1e12)
    inside = layout["gpus_per_node"] % layout["dp_shard"] == 0
    rates = {
        "dp_shard": gpu.link if inside else link,
        "dp_replicate": link / min(layout["dp_shard"], layout["gpus_per_node"]) if nodes > 1 else gpu.link,
    }
    taken = dict.fromkeys(rates, 0.0)
    for one in result["traffic"]:
        taken[one["axis"]] += one["sent"] / (rates[one["axis"]] * 1e9)
    update = 60 * result["model"]["principal"] / layout["dp_shard"] / (gpu.hbm * 1e9)  # bytes read and written
    seconds = max(compute, taken["dp_shard"]) + taken["dp_replicate"] + update
    return {
        "seconds": seconds,
        "computing": compute,
        "dp_shard": taken["dp_shard"],
        "dp_replicate": taken["dp_replicate"],
        "updating": update,
        "tokens_per_second": tokens / seconds,
    }


def check_fits(config: Config, nodes: int, gpus_per_node: int) -> None:
    """Raises ``UserError`` for a run that cannot fit in ``slurm.gpu_memory``, where that is set."""
    if config.slurm.gpu_memory is None:
        return
    decisive = (config.model, config.data, config.selection, config.train, config.mesh, config.slurm.gpu_memory)
    if (key := repr((decisive, nodes, gpus_per_node))) in _known_to_fit:  # of another task of an array
        return
    found = plan(config, nodes, gpus_per_node, Gpu(config.slurm.gpu_memory))
    if not found["fits"]:
        raise UserError(f"slurm.gpu_memory={config.slurm.gpu_memory:g}: {_verdict(found)}")
    _known_to_fit.add(key)


_known_to_fit: set[str] = set()


def _verdict(found: dict[str, Any]) -> str:
    if found["fits"]:
        return f"fits: {_gib(found['peak'])} of {_gib(found['usable'])}"
    advice = (
        "no number of shards makes it fit: set model.activation_checkpointing=true, or lower train.micro_batch_size"
    )
    if found["smallest"] is not None:
        advice = f"it needs {found['smallest']} shards"
    return f"does not fit: {_gib(found['peak'])} of {_gib(found['usable'])} on {found['layout']['dp_shard']} shards; {advice}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def run(options: argparse.Namespace) -> Iterator[str]:
    """A plan, line by line; ends with code 1 where the run does not fit. Raises ``UserError``."""
    config, _ = configs.load(options.config, options.overrides)
    nodes = config.slurm.nodes if options.nodes is None else options.nodes
    gpus_per_node = options.gpus_per_node
    if gpus_per_node is None:
        gpus_per_node = config.slurm.ranks_per_node or config.slurm.gpus_per_node or 8
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node), ("--link-gbps", options.link_gbps)):
        if value <= 0:
            raise UserError(f"{name} must be above 0, got {value}")
    if options.gpu and options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}: must be one of {', '.join(GPUS)}; or give --gpu-memory")
    gpu = GPUS[options.gpu] if options.gpu else None
    gib = options.gpu_memory or (None if gpu else config.slurm.gpu_memory)
    if gib is not None:
        gpu = (gpu or Gpu(gib))._replace(memory=gib)
    found = plan(config, nodes, gpus_per_node, gpu, options.link_gbps)
    yield from [json.dumps(found, indent=2)] if options.json else describe(found)
    if found["fits"] is False:
        sys.exit(1)


def describe(found: dict[str, Any]) -> Iterator[str]:
    """A plan as lines to read."""
    layout, model, step = found["layout"], found["model"], found["step"]
    yield (
        f"{layout['nodes']} x {layout['gpus_per_node']} ranks: {layout['dp_replicate']} replicas of {layout['dp_shard']} shards"
    )
    counts = model["parameters"] / 1e9, model["principal"] / 1e6, model["matrices"]
    yield "{:.2f} G parameters, {:.1f} M principal in {} matrices".format(*counts)
    yield "memory of the fullest rank"
    for name, size in found["memory"].items():
        notes = {"loss": "in place of layers and computing", "selecting": "in place of all since root"}
        note = f"   {notes[name]}" if name in notes else ""
        yield f"  {name:16s}{_gib(size):>12s}{note}"
    yield f"  {'at the worst':16s}{_gib(found['peak']):>12s}"
    if found["fits"] is not None:
        yield _verdict(found)
    yield "sent by a rank in a step"
    for one in found["traffic"]:
        yield f"  {one['axis']:13s} {one['operation']:15s}{_gib(one['sent']):>12s}   {one['calls']} calls"
    if "seconds" in step:
        yield (
            f"step     {step['seconds']:.2f} s, {step['tokens_per_second']:,.0f} tokens/s: computing {step['computing']:.2f} s, "
            f"meanwhile shards {step['dp_shard']:.2f} s; replicas {step['dp_replicate']:.2f} s, update {step['updating']:.3f} s"
        )
        yield f"select   about {found['selection']['seconds']:.0f} s"
    yield f"save     {_gib(found['checkpoint']['bytes'])}, {found['checkpoint']['seconds']:.1f} s"
