"""Memory and traffic of a rank, by formulas over the shapes of a model.

For S shards, R replicas, P parameters, N of them in trained matrices, density d; bytes on the fullest rank:

    weights              2 P / S       plus the unsharded root: head, last norm, and an embedding tied to the head
    principal            20 d N / S    values, gradient and two moments 4 B each, indices 4 B; other optimizers: their states
                         14 d N / S    with optimizer.dtype=bfloat16: values and moments 2 B each
    base values           6 d N / S    where they are kept: 2 B each, indices 4 B; a refresh adds those of weights new to it
    previously selected  N / (8 S)     one bit per weight, from the first refresh on
    trained              14 N / S      instead of these two, of weights that are trained whole: gradient and two moments 4 B each,
                                       and a value of 4 B; 6 N / S with optimizer.dtype=bfloat16
    layers               one layer gathered, plus the gradient of another one and its copy in the reduce-scatter buffer
    statistics           4 N / S       of selection.criterion=gradient, 8 N / S of sensitivity, while a selection is made
    activations          what a layer keeps for its backward, times layers; measured by running two layers on fake tensors

Traffic is that of ring algorithms: n (S - 1) / S for an all-gather or reduce-scatter of n bytes, twice that for an all-reduce.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

from liftdist.distributed.sharding import row_bounds
from liftdist.engine import selection
from liftdist.engine.decoder import towers
from liftdist.engine.matrices import Place, principal_matrices
from liftdist.errors import UserError
from liftdist.methods.lift import rules
from liftdist.models import build
from liftdist.models.head import in_chunks
from liftdist.planning.live_bytes import LiveBytes
from liftdist.registry import LOSSES, METHODS, OPTIMIZERS
from liftdist.schema import Config


@dataclass(frozen=True)
class FSDPUnit:
    """An FSDP module: its parameters are gathered and reduced together."""

    shapes: tuple[tuple[int, ...], ...]  # of all parameters
    trained: Mapping[str, Place]  # the trained matrices, by name

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def padded(self, shards: int, trained: bool = False) -> int:
        """Weights of the largest shard, to which every shard is padded; with ``trained``, of the trained matrices only."""
        held = {place.parameter: tuple(place.param.shape) for place in self.trained.values()}
        shapes = held.values() if trained else self.shapes
        return sum(row_bounds(shape[0], shards)[1] * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Sizes:
    """Shapes of a model."""

    layers: tuple[FSDPUnit, ...]
    embedding: FSDPUnit  # empty if tied to the head: the root holds it then
    root: FSDPUnit
    towers: FSDPUnit  # sharded, but never gathered, as no text passes through
    itemsize: int  # bytes per weight
    query: int  # width of the attention: heads x head dim
    buffers: int = 0  # bytes of buffers that checkpoints hold, whole on every rank
    experts: int = 0  # weights of experts
    reached: float = 1.0  # share of the experts that a token reaches

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @property
    def trained(self) -> dict[str, tuple[int, int]]:
        """Shapes of the trained matrices, by name."""
        return {name: place.shape for unit in self.units for name, place in unit.trained.items()}

    @property
    def units(self) -> tuple[FSDPUnit, ...]:
        return *self.layers, self.embedding, self.root, self.towers


def sizes(model: PreTrainedModel, config: Config) -> Sizes:
    """The sizes of a model, which may be on the meta device, for the method of ``config``.

    Raises:
        UserError: no module fits ``selection.modules``.
    """
    every = principal_matrices(model)
    trained: dict[int, dict[str, Place]] = {}  # by parameter
    for name, place in METHODS.load(config.method).places(config, model).items():
        trained.setdefault(id(place.param), {})[name] = place

    seen: set[int] = set()  # what several units share is counted once

    def unit(*modules: nn.Module) -> FSDPUnit:
        unique = {id(param): param for module in modules for param in module.parameters() if id(param) not in seen}
        seen.update(unique)
        chosen = {name: place for p in unique for name, place in trained.get(p, {}).items()}
        return FSDPUnit(tuple(tuple(p.shape) for p in unique.values()), chosen)

    embedding = build.own_embedding(model)
    layers = tuple(unit(layer) for layer in build.decoder_layers(model))
    beside = unit(*towers(model))
    embedded = unit(*([] if embedding is None else [embedding]))
    rest, width = unit(model), _width_of_attention(model.config)
    buffers = sum(t.nbytes for t in build.tensors(model).values() if not isinstance(t, nn.Parameter))
    fused = {id(place.param): place.param for place in every.values() if place.param.ndim > 2}
    weights = sum(param.numel() for param in fused.values())
    reached = _reached(model.config, next(iter(fused.values())).shape[0]) if fused else 1.0
    return Sizes(layers, embedded, rest, beside, model.dtype.itemsize, width, buffers, weights, reached)


def _reached(hf_config: Any, experts: int) -> float:
    """The share of the experts that a token reaches; all of them if the configuration has no name for it that is known."""
    text = hf_config.get_text_config(decoder=True)
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    number = next((value for name in names if isinstance(value := getattr(text, name, None), int)), experts)
    return min(1.0, number / experts)


def _width_of_attention(hf_config: Any) -> int:
    """Heads times their size, the largest of all layers; 0 without attention."""
    text = hf_config.get_text_config(decoder=True)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    heads = getattr(text, "num_attention_heads", None)
    return (
        max(heads * (getattr(part, "head_dim", None) or text.hidden_size // heads) for part in layers) if heads else 0
    )


class Activations(NamedTuple):
    """Bytes of activations of a micro-batch."""

    fixed: int  # independent of the number of layers
    layer: int  # per layer, from its forward to its backward
    loss: int  # in addition, while the loss is computed
    backward: int  # in addition, while one layer's backward runs


def activations(hf_config: Any, config: Config, rows: int) -> Activations:
    """Activations of ``rows`` sequences: runs the real model with one and two layers, forward and backward, on fake tensors."""
    loss = LOSSES.load(config.train.loss).make(config.train)
    kept, losses, backwards = [], [], []
    for layers in (1, 2):
        live = LiveBytes()
        packed, grouped = packing_known(config.data.packing), grouped_products_known()
        model = build.build(_with_layers(hf_config, layers), config.model)
        trained = _trained(model, config)
        with FakeTensorMode(allow_non_fake_inputs=True), packed, grouped, live:
            model.to_empty(device="cpu").train()
            build.recompute(model, config.model)
            for name, param in model.named_parameters():
                param.requires_grad_(name in trained)
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            shape = (rows, config.data.max_length)
            tokens = torch.zeros(shape, dtype=torch.int64)
            before = live.peak = live.now
            in_chunks(model)
            places = torch.arange(shape[1])
            with torch.no_grad():
                base = model.hidden_at(tokens, None, places) if loss.needs_base else None
            total = model.chunked_loss(tokens, None, places, tokens, loss.per_token, base=base)
            kept.append(live.now - before)
            losses.append(live.peak - live.now)
            live.peak = live.now
            total.backward()
            backwards.append(live.peak - before - kept[-1])
    layer = kept[1] - kept[0]
    return Activations(kept[0] - layer, layer, losses[1], backwards[1])


def _trained(model: PreTrainedModel, config: Config) -> set[str]:
    """The names of the parameters that are trained, after adding to the model what is not in its files."""
    method = METHODS.load(config.method)
    try:
        method.extend(config, model)
        found = method.places(config, model)
    except UserError:  # the patterns match later layers only
        every = dataclasses.replace(config.selection, modules=["*"])
        adapted = dataclasses.replace(config.lora, modules=[])
        return _trained(model, dataclasses.replace(config, selection=every, lora=adapted))
    return {place.parameter for place in found.values()}


def packing_known(packing: bool) -> contextlib.AbstractContextManager:
    """Tell transformers whether samples are packed: on fake tensors it assumes so, and builds a mask of all token pairs."""
    if packing:
        return contextlib.nullcontext()
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)


def grouped_products_known() -> contextlib.AbstractContextManager:
    """Let experts compute by transformers' own operation: on fake tensors torch's grouped product takes bf16 alone."""
    own = moe._can_use_grouped_mm
    return mock.patch.object(
        moe, "_can_use_grouped_mm", lambda *tensors: tensors[1].dtype == torch.bfloat16 and own(*tensors)
    )


#: Settings that make the first layers of a model with experts dense.
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def _with_layers(hf_config: Any, layers: int) -> Any:
    """The configuration with its last layers, with experts if the model has any."""
    shallow = copy.deepcopy(hf_config)
    text = shallow.get_text_config(decoder=True)
    for key, value in vars(text).items():  # the kinds of layers
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[-layers:])
    for key in DENSE_FIRST:
        if getattr(text, key, None):
            setattr(text, key, 0)
    text.num_hidden_layers = layers
    return shallow


# ---------------------------------------------------------------------------------------------------------------------
# Memory and traffic.


def memory(size: Sizes, config: Config, shards: int, kept: Activations) -> dict[str, int]:
    """Bytes by component, on the fullest rank."""

    def unsharded(unit: FSDPUnit) -> int:
        return size.itemsize * unit.padded(shards) * shards

    gathered, embedding, root = max(map(unsharded, size.layers)), unsharded(size.embedding), unsharded(size.root)
    reduced = max(unit.padded(shards, trained=True) * shards for unit in size.units)
    counts = selected(size, config)
    states = getattr(criterion(config), "states", 0) if config.method == "lift" else 0
    is_sparse = _is_sparse(config) and not states  # gradients that are gathered are reduced whole
    sent = size.itemsize if shards > 1 and is_sparse else 4  # bytes per gradient to be reduced
    exchanged = (
        max(16 * shards * _width(unit, counts, shards) for unit in size.units) if shards > 1 and is_sparse else 0
    )
    return {
        "weights": size.itemsize * sum(unit.padded(shards) for unit in size.units) + size.buffers,
        **(_of_lift(size, config, shards, counts) if config.method == "lift" else _of_dense(size, config, shards)),
        "root, whole": root,
        # in the first forward, besides the root: a unit that is gathered is held twice, as all-gather buffer and as
        # parameters; FSDP keeps the buffer until the next unit is gathered
        "first all-gather buffers": max(root + 2 * embedding, (embedding or root) + 2 * gathered),
        # the next layer is gathered while one is computed; the latter is freed before its gradients are copied to the buffer
        "layers, whole": gathered
        + max(gathered + size.itemsize * reduced, (size.itemsize + sent) * reduced + 4 * reduced // shards + exchanged),
        "activations": kept.fixed + len(size.layers) * kept.layer,
        "computing": kept.backward,
        "loss": kept.loss,
        "selecting": _selecting(size, config, shards, counts)
        if config.method == "lift"
        else _initialising(size, config),
        # in a selection by gradients, besides activations and layers, and while matrices are gathered
        **(
            {"statistics": 4 * states * sum(unit.padded(shards, trained=True) for unit in size.units)} if states else {}
        ),
    }


def _of_lift(size: Sizes, config: Config, shards: int, counts: Mapping[str, int]) -> dict[str, int]:
    bits = sum(unit.padded(shards, trained=True) for unit in size.units) if config.selection.refresh_interval else 0
    held = sum(_width(unit, counts, shards) for unit in size.units)
    base = {"base values": (4 + size.itemsize) * held} if config.keeps_base else {}
    return {"principal": _bytes_each(config) * held, **base, "previously selected": bits // 8}


def _of_dense(size: Sizes, config: Config, shards: int) -> dict[str, int]:
    """What trained parameters take beyond the weights: a higher dtype, gradient and two moments."""
    each = 4 * _element(config) - size.itemsize
    return {"trained": each * sum(unit.padded(shards, trained=True) for unit in size.units)}


def _selecting(size: Sizes, config: Config, shards: int, counts: Mapping[str, int]) -> int:
    """The matrix being factored, the next one being gathered, and the rows sent for it."""
    workspace = functools.partial(selection.workspace_of, criterion(config))
    marked = bool(config.selection.exclude)  # one byte per weight
    factoring = max(workspace(m, n, counts[name]) + marked * m * n for name, (m, n) in size.trained.items())
    return (3 * size.itemsize * max(m * n for m, n in size.trained.values()) if shards > 1 else 0) + factoring


def _initialising(size: Sizes, config: Config) -> int:
    """A whole matrix, and what peft makes of it in float32 for the initial values of DoRA (16 B a weight) or PiSSA (20 B)."""
    if config.method != "lora" or config.lora.variant not in ("dora", "pissa"):
        return 0
    each = size.itemsize + (16 if config.lora.variant == "dora" else 20)
    columns = {name.partition(".lora_A.")[0]: shape[1] for name, shape in size.trained.items() if ".lora_A." in name}
    rows = {name.partition(".lora_B.")[0]: shape[0] for name, shape in size.trained.items() if ".lora_B." in name}
    return each * max(rows[name] * columns[name] for name in rows)


def _is_sparse(config: Config) -> bool:
    """Whether gradients are reduced sparsely within a replica."""
    return config.method == "lift" and config.mesh.sparse_reduce_scatter


def _element(config: Config) -> int:
    """Bytes of a trained value."""
    return torch.finfo(getattr(torch, config.optimizer.dtype)).bits // 8


def _bytes_each(config: Config) -> int:
    """Bytes of a principal weight on the rank that holds it: index and gradient; value and states."""
    return 8 + (1 + _states(config)) * _element(config)


def saved_bytes(config: Config) -> int:
    """Bytes of a trained weight in a file: index, value and states; no index where all are trained, but PiSSA's initial value."""
    element = _element(config)
    initial = 4 * (config.method == "lora" and config.lora.variant == "pissa")
    return (4 + (1 + _states(config)) * element) if config.method == "lift" else 3 * element + initial


def _states(config: Config) -> int:
    """Element-wise states of the optimizer."""
    return len(OPTIMIZERS.load(config.optimizer.name).element_states(config.optimizer))


def peak(parts: dict[str, int]) -> int:
    """Peak bytes of a run, from the parts of :func:`memory`: of training, of its first forward, or of a selection."""
    held = sum(parts.get(name, 0) for name in ("weights", "principal", "base values", "previously selected", "trained"))
    backward = parts["layers, whole"] + parts["computing"]
    training = parts["root, whole"] + parts["activations"] + max(backward, parts["loss"])
    gathering = parts["root, whole"] + parts["first all-gather buffers"]
    statistics = parts.get("statistics", 0)
    return held + max(training + statistics, gathering, parts["selecting"] + statistics)


def criterion(config: Config) -> Any:
    """The criterion of a config, see :class:`liftdist.engine.selection.Criterion`."""
    return rules(config.selection)[0]


def selected(size: Sizes, config: Config) -> Mapping[str, int]:
    """Number of weights to train in each matrix, by name, as its budget allots them: with ``selection.exclude``, at most.

    Raises:
        UserError: the criterion decides it.
    """
    if config.method != "lift":
        return {name: math.prod(shape) for name, shape in size.trained.items()}
    chosen, budget = rules(config.selection)
    if selection.decides_number(chosen):
        raise UserError(
            f"selection.criterion={config.selection.criterion}: how many weights are trained is known when they are selected; "
            f"run liftdist select, and plan with the selection.density that it prints and another criterion"
        )
    return budget.allot(size.trained)


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over one mesh axis in one optimizer step."""

    axis: str
    operation: str
    calls: int
    payload: int  # input bytes of a rank over all calls: its shard for an all-gather, the full tensor for a reduction

    def sent(self, ranks: int) -> int:
        """Bytes that a rank sends with a ring algorithm."""
        per_payload = {
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
            "all_reduce": 2 * (ranks - 1) / ranks,
        }
        return round(self.payload * per_payload[self.operation])


def traffic(size: Sizes, config: Config, replicas: int, shards: int) -> list[Collective]:
    """Collectives of one optimizer step, without those of a few scalars."""
    micro = micro_batches(config, replicas * shards)
    found = []
    if shards > 1:
        twice = [*size.layers, *([size.embedding] if size.embedding.trained else [])]  # in forward and in backward
        once = [unit for unit in (size.embedding, size.root) if unit.shapes and unit not in twice]
        calls = 2 * len(twice) + len(once)
        gathered = sum(unit.padded(shards) for unit in (*twice, *twice, *once))
        found.append(Collective("dp_shard", "all_gather", micro * calls, micro * size.itemsize * gathered))
        reduced = [unit for unit in size.units if unit.trained]
        counts = selected(size, config)
        widths = [_width(unit, counts, shards) for unit in reduced]
        dense = [4 * shards * unit.padded(shards, trained=True) for unit in reduced]
        sparse = [_is_sparse(config) and 8 * w < d // shards for w, d in zip(widths, dense, strict=True)]
        indices = sum(4 * width for width, is_sparse in zip(widths, sparse, strict=True) if is_sparse)
        gradients = sum(
            4 * shards * w if is_sparse else d for w, d, is_sparse in zip(widths, dense, sparse, strict=True)
        )
        if any(sparse):
            found.append(Collective("dp_shard", "all_gather", micro * sum(sparse), micro * indices))
        found.append(Collective("dp_shard", "reduce_scatter", micro * len(reduced), micro * gradients))
    if replicas > 1:
        counts = selected(size, config)
        if config.method == "lift":
            flat = sum(_width(unit, counts, shards) for unit in size.units)
            found.append(Collective("dp_replicate", "all_reduce", 1, 4 * flat))
        else:  # one for each parameter
            whole = sum(unit.padded(shards, trained=True) for unit in size.units)
            found.append(Collective("dp_replicate", "all_reduce", len(size.trained), _element(config) * whole))
    return found


def _width(unit: FSDPUnit, counts: Mapping[str, int], shards: int) -> int:
    """Principal weights of a unit in the fullest shard."""
    return sum(held(place, counts[name], shards) for name, place in unit.trained.items())


def held(place: Place, count: int, shards: int) -> int:
    """How many of the ``count`` principal weights of a matrix the first shard holds, which has as many rows as any other,
    assuming that they are spread evenly."""
    return -(-count // shards) if place.is_whole else -(-count * place.row_bounds(shards)[1] // place.rows)


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches per step of the rank with the most sequences."""
    return math.ceil(math.ceil(config.train.batch_size / ranks) / config.train.micro_batch_size)


def rows(config: Config, ranks: int) -> int:
    """Sequences in the largest micro-batch of a rank."""
    return min(config.train.micro_batch_size, math.ceil(config.train.batch_size / ranks))


def operations(size: Sizes, config: Config) -> int:
    """Floating-point operations per token in forward and backward, without recomputation."""
    idle = 1 - size.reached  # of the experts
    products = size.numel - size.embedding.numel - size.towers.numel - idle * size.experts  # an embedding is a lookup
    places = [place for unit in size.units for place in unit.trained.values()]
    trained = sum(place.numel * (1 if place.is_whole else size.reached) for place in places)
    attention = 2 * len(size.layers) * size.query * config.data.max_length  # causal: half of all pairs, two products
    return round(2 * (2 * products + trained)) + 3 * attention
