"""Memory and traffic of a rank, by formulas over the shapes of a model.

For S shards, R replicas, P parameters, N of them in trained matrices, density d; bytes on the fullest rank:

    weights              2 P / S       plus the unsharded root: head, last norm, and an embedding tied to the head
                                       with model.base_dtype 1.03 (int8), 1 (fp8) or 0.53 B (nf4) for matrices of the decoder
                                       in place of 2, and 3 B for each exact weight over them: value and distance
    principal            20 d N / S    values, gradient and two moments 4 B each, indices 4 B; other optimizers: their states
                         14 d N / S    with optimizer.dtype=bfloat16: values and moments 2 B each
                                       with optimizer.device=cpu all of it on the host, and none here
    base values           6 d N / S    where they are kept: 2 B each, indices 4 B; a refresh adds those of weights new to it
    previously selected  N / (8 S)     one bit per weight, from the first refresh on
    other variants       these three   of each run besides the one that has the model
    places               8 k           of variant=shira: row and column of each value, for each shape of matrix, on every rank
    trained              14 N / S      instead of these two, of weights that are trained whole: gradient and two moments 4 B each,
                                       and a value of 4 B; 6 N / S with optimizer.dtype=bfloat16
                         of variant=adalora 12 B more, or 6
    layers, whole        one layer gathered, another one as it is sent, and the buffer of a third one's gradients, while a layer
                         is computed
    computing            what that layer computes, and its gradients; measured on fake tensors
    reducing             in place of both, when that layer is freed: its gradients with the buffer into which they are copied, or
                         that buffer with what its reduction takes. What gloo, on processors, copies besides is left out
    statistics           4 N / S       while a selection is made by gradients: of sensitivity 8 N / S, of spiel 12 N / S
    activations          what a layer keeps for its backward, times layers; measured by running two layers on fake tensors;
                         where each n-th is recomputed, of both kinds; with model.offload_activations what is not on the host

Traffic is that of ring algorithms: n (S - 1) / S for an all-gather or reduce-scatter of n bytes, twice that for an all-reduce.
With optimizer.device=cpu, between a rank and its host: gradients 4 B each and positions 4 B each in every micro-batch, once more
where they are sent to the other shards; after it values 2 B each and, unless the base is quantised, positions 4 B each. Of a
refresh nothing is counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from liftdist.engine import selection
from liftdist.engine.matrices import Place
from liftdist.engine.quantisation import Format
from liftdist.errors import UserError
from liftdist.methods.lift import criterion_of, rules
from liftdist.planning.activations import Activations
from liftdist.planning.shapes import FSDPUnit, Sizes
from liftdist.registry import OPTIMIZERS
from liftdist.schema import Config


def memory(
    size: Sizes, config: Config, shards: int, kept: Activations, others: Sequence[Config] = ()
) -> dict[str, int]:
    """Bytes by component, on the fullest rank.

    Args:
        others: configs of runs that share the model, and leave it to this one.
    """

    def unsharded(unit: FSDPUnit) -> int:
        return size.itemsize * unit.gathered(shards).padded(shards) * shards

    gathered, embedding, root = max(map(unsharded, size.layers)), unsharded(size.embedding), unsharded(size.root)
    counts = selected(size, config)
    # a layer as it is gathered; copied out of that buffer, as parameters or to be dequantised
    packed = max(shards * _packed(unit.gathered(shards), size, counts, shards) for unit in size.layers)
    copied = packed + (gathered + max(unit.codes for unit in size.layers) if config.model.base_dtype else 0)
    buffered = packed if shards > 1 else 0  # the all-gather buffer of another layer: a single shard is copied without
    states = getattr(criterion_of(config.selection), "states", 0) if config.method == "lift" else 0
    units = size.units if states else _needing_gradients(size, config)
    of_layers, rest = units[: len(size.layers)], units[len(size.layers) :]
    reductions = functools.partial(_reduction, size.itemsize, config, shards, counts)
    left = max((reductions(unit, states).buffer for unit in of_layers[1:]), default=0)
    of_others = (kept.after + reductions(unit, states).peak for unit in rest)
    copying = buffered + copied + left if config.model.base_dtype else 0  # of the next layer, before its backward
    staying = min(config.model.keep_gathered, len(size.layers)) if shards > 1 else 0  # layers
    ahead = 0 if staying > 1 else buffered  # of the next layer, unless that is kept, too
    return {
        "weights": sum(_packed(unit, size, counts, shards) for unit in size.units) + size.buffers,
        **(
            _of_lift(size, config, shards, counts, bool(others))
            if config.method == "lift"
            else _of_dense(size, config, shards)
        ),
        **({"other variants": sum(_of_others(size, other, shards) for other in others)} if others else {}),
        "root, whole": root,
        # in the first forward, besides the root: a unit that is gathered is held twice, as all-gather buffer and as
        # parameters; FSDP keeps the buffer until the next unit is gathered
        "first all-gather buffers": max(root + 2 * embedding, (embedding or root) + packed + copied)
        if shards > 1
        else max(embedding, copied),
        # a layer is computed while the next one is gathered; of the former one the activations are freed, but FSDP keeps the
        # buffer from which its gradients were reduced
        "layers, whole": max(1, staying) * gathered + ahead + max(0, left - kept.layer),
        "activations": kept.fixed + len(size.layers) * kept.layer - recomputed(size, config) * kept.spared,
        **(
            {OFFLOADED: len(size.layers) * kept.on_host - recomputed(size, config) * kept.spared_on_host}
            if config.model.offload_activations
            else {}
        ),
        "computing": kept.backward,
        # a layer is freed before its gradients are reduced
        "reducing": max(
            copying,
            max(0, staying - 1) * gathered
            + kept.after
            + ahead
            + max(reductions(unit, states).peak for unit in of_layers),
            *of_others,
        ),
        # FSDP keeps the all-gather buffer of the last layer until the forward has ended
        "loss": staying * gathered + buffered + kept.loss,
        "selecting": _selecting(size, config, shards, counts)
        if config.method == "lift"
        else _initialising(size, config),
        # in a selection by gradients, besides activations and layers, and while matrices are gathered
        **(
            {"statistics": 4 * states * sum(unit.padded(shards, trained=True) for unit in size.units)} if states else {}
        ),
    }


class _Reduction(NamedTuple):
    """Bytes in the reduction of a unit's gradients."""

    buffer: int  # until the gradients of another unit are to be reduced
    peak: int


def _reduction(
    itemsize: int, config: Config, shards: int, counts: Mapping[str, int], unit: FSDPUnit, whole: int
) -> _Reduction:
    """Gradients are copied into a buffer and freed; the buffer is reduced in float32, and the result rounded.

    Args:
        whole: whether a selection needs whole gradients.
    """
    row, width = unit.padded(shards, trained=True), _width(unit, counts, shards)
    is_sparse = shards > 1 and _is_sparse(config)
    buffer = (itemsize if is_sparse else 4) * shards * row
    if shards == 1:
        reducing = 4 * row  # the buffer is divided by 1 into another one
    elif not is_sparse:
        reducing = 0
    elif whole or 8 * width >= 4 * row:
        reducing = 4 * shards * row if itemsize != 4 else 0
    else:  # positions that all shards sent, their places in the buffer, and what is there, also in float32
        reducing = ((4 + 8 + 4 + (itemsize if itemsize != 4 else 0)) * shards + 4) * width
    gradients = itemsize * sum(map(math.prod, unit.trained_shapes))
    rounded = itemsize * row if itemsize != 4 else 0
    return _Reduction(buffer, buffer + max(gradients, 4 * row + max(reducing, rounded)))


def _of_others(size: Sizes, config: Config, shards: int) -> int:
    parts = _of_lift(size, config, shards, selected(size, config), shares=True)
    return sum(part for name, part in parts.items() if name != ON_HOST)


def _of_lift(
    size: Sizes, config: Config, shards: int, counts: Mapping[str, int], shares: bool = False
) -> dict[str, int]:
    bits = sum(unit.padded(shards, trained=True) for unit in size.units) if config.selection.refresh_interval else 0
    held = sum(_width(unit, counts, shards) for unit in size.units)
    base = {"base values": (4 + size.itemsize) * held} if config.keeps_base or shares else {}
    principal = _bytes_each(config) * held
    where = {"principal": 0, ON_HOST: principal} if config.optimizer.device == "cpu" else {"principal": principal}
    return {**where, **base, "previously selected": bits // 8}


def _packed(unit: FSDPUnit, size: Sizes, counts: Mapping[str, int], shards: int) -> int:
    """Bytes of a shard of a unit, as it is kept and gathered."""
    exact = {name: held(place, counts[name], shards) for name, place in unit.trained.items()}
    return unit.kept(shards, size.itemsize, exact)


def _of_dense(size: Sizes, config: Config, shards: int) -> dict[str, int]:
    """What trained parameters take beyond the weights: a higher dtype, gradient and two moments."""
    of_ranks = 3 if _drops_ranks(config) else 0  # importance, its average, and its distance from that
    each = (4 + of_ranks) * _element(config) - size.itemsize
    trained = {"trained": each * sum(unit.padded(shards, trained=True) for unit in size.units)}
    if config.method == "lora" and config.lora.variant == "shira":  # row and column, 4 B each, whole on every rank
        trained["places"] = 8 * config.lora.rank * sum(map(sum, size.adapted))
    return trained


def _selecting(size: Sizes, config: Config, shards: int, counts: Mapping[str, int]) -> int:
    """The matrix being factored, the next one being gathered, and the rows sent for it; their statistics, if it goes by them."""
    criterion = criterion_of(config.selection)
    workspace = functools.partial(selection.workspace_of, criterion)
    marked = bool(config.selection.exclude)  # one byte per weight
    factoring = max(workspace(m, n, counts[name]) + marked * m * n for name, (m, n) in size.trained.items())
    has_statistics = bool(getattr(criterion, "states", 0))
    element, kind = (4, None) if has_statistics else (size.itemsize, config.model.base_dtype)
    if shards == 1 and kind is None:
        return factoring  # where it is
    places = {name: place for unit in size.units for name, place in unit.trained.items()}

    def travelling(name: str, place: Place) -> int:
        if kind is None or place.columns != place.width:
            return element * place.numel
        return place.rows * Format(kind, place.columns).row_bytes + (1 + element) * counts[name]

    whole = element * max(place.numel for place in places.values())
    sent = max(travelling(name, place) for name, place in places.items()) if shards > 1 else 0
    return factoring + whole + 2 * sent


def _initialising(size: Sizes, config: Config) -> int:
    """A whole matrix, and what peft makes of it in float32 for the initial values of DoRA (16 B a weight) or PiSSA (20 B). Of EVA
    the vectors of all modules, and a module's inputs in a batch (22 B each)."""
    if config.method == "lora" and config.lora.variant == "eva":
        names = {name: place for unit in size.units for name, place in unit.trained.items()}
        vectors = sum(place.rows * place.columns for name, place in names.items() if ".lora_A." in name)
        tokens = config.train.micro_batch_size * config.data.max_length
        return 4 * vectors + 22 * tokens * max(map(max, size.adapted))
    if config.method != "lora" or config.lora.variant not in ("dora", "pissa"):
        return 0
    each = size.itemsize + (16 if config.lora.variant == "dora" else 20)
    return each * max(map(math.prod, size.adapted))


def _drops_ranks(config: Config) -> bool:
    """Whether adapters lose ranks."""
    return config.method == "lora" and config.lora.variant == "adalora"


def _is_sparse(config: Config) -> bool:
    """Whether gradients are reduced sparsely within a replica."""
    return config.method == "lift" and config.mesh.sparse_reduce_scatter


def _is_exchanged(unit: FSDPUnit, config: Config, counts: Mapping[str, int], shards: int) -> bool:
    """Whether those of a unit are, and not whole."""
    entries, row = _width(unit, counts, shards), unit.padded(shards, trained=True)
    return shards > 1 and _is_sparse(config) and 8 * entries < 4 * row


def _element(config: Config) -> int:
    """Bytes of a trained value."""
    return torch.finfo(getattr(torch, config.optimizer.dtype)).bits // 8


def _bytes_each(config: Config) -> int:
    """Bytes of a principal weight on the rank that holds it: index and gradient; value and states."""
    return 8 + (1 + _states(config)) * _element(config)


def saved_bytes(config: Config) -> int:
    """Bytes of a trained weight in a file: value and states; of LIFT and SHiRA its index, of PiSSA its initial value, of
    AdaLoRA two averages."""
    element = _element(config)
    further = 4 * (config.method == "lora" and config.lora.variant in ("pissa", "shira"))
    further += 2 * element * _drops_ranks(config)
    return (4 + (1 + _states(config)) * element) if config.method == "lift" else 3 * element + further


def _states(config: Config) -> int:
    """Element-wise states of the optimizer."""
    return len(OPTIMIZERS.load(config.optimizer.name).element_states(config.optimizer))


ON_HOST = "principal, on the host"
OFFLOADED = "activations, on the host"
HELD = ("weights", "principal", "base values", "previously selected", "other variants", "trained", "places")


def peak(parts: dict[str, int]) -> int:
    """Peak bytes of a run, from the parts of :func:`memory`: of training, of its first forward, or of a selection."""
    held = sum(parts.get(name, 0) for name in HELD)
    backward = parts["layers, whole"] + parts["computing"]
    training = parts["root, whole"] + parts["activations"] + max(backward, parts["reducing"], parts["loss"])
    gathering = parts["root, whole"] + parts["first all-gather buffers"]
    statistics = parts.get("statistics", 0)
    return held + max(training + statistics, gathering, parts["selecting"] + statistics)


def recomputed(size: Sizes, config: Config) -> int:
    """How many layers are recomputed."""
    every = config.model.recomputed_every
    return -(-len(size.layers) // every) if every else 0


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


def _needing_gradients(size: Sizes, config: Config) -> list[FSDPUnit]:
    """The units with the matrices for which backward computes gradients: all of them, an upper bound, if numbers may change."""
    if config.method != "lift":
        return list(size.units)
    chosen, budget = rules(config.selection)
    may_change = selection.decides_number(chosen) or any(
        getattr(budget, name, False) for name in ("redraws", "compares")
    )
    counts = dict.fromkeys(size.trained, 1) if may_change else selected(size, config)
    return [unit.needing_gradients(counts) for unit in size.units]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over one mesh axis in one optimizer step, or all copies in one direction between a rank and its
    host, whose axis is ``host``."""

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
            "to_host": 1,
            "to_device": 1,
        }
        return round(self.payload * per_payload[self.operation])


def traffic(size: Sizes, config: Config, replicas: int, shards: int) -> list[Collective]:
    """Collectives of one optimizer step, without those of a few scalars, such as a score for each rank of an adapter."""
    micro = micro_batches(config, replicas * shards)
    found = []
    if shards > 1:
        first = max(0, len(size.layers) - config.model.keep_gathered)  # of the layers that stay gathered
        twice = [
            *size.layers[:first],
            *([size.embedding] if size.embedding.trained else []),
        ]  # in forward and in backward
        once = [
            *size.layers[first:],
            *(unit for unit in (size.embedding, size.root) if unit.shapes and unit not in twice),
        ]
        counts = selected(size, config)
        gathers = [*twice, *twice, *once, *(_of_base(size, config, first) if config.train.needs_base else [])]
        gathered = sum(_packed(unit, size, counts, shards) for unit in gathers)
        found.append(Collective("dp_shard", "all_gather", micro * len(gathers), micro * gathered))
        reduced = [unit for unit in _needing_gradients(size, config) if unit.trained]
        widths = [_width(unit, counts, shards) for unit in reduced]
        dense = [4 * shards * unit.padded(shards, trained=True) for unit in reduced]
        sparse = [_is_exchanged(unit, config, counts, shards) for unit in reduced]
        indices = sum(4 * width for width, is_sparse in zip(widths, sparse, strict=True) if is_sparse)
        gradients = sum(
            4 * shards * w if is_sparse else d for w, d, is_sparse in zip(widths, dense, sparse, strict=True)
        )
        if any(sparse):
            found.append(Collective("dp_shard", "all_gather", micro * sum(sparse), micro * indices))
        found.append(Collective("dp_shard", "reduce_scatter", micro * len(reduced), micro * gradients))
        if _drops_ranks(config):  # all A and B, for the regularisation
            places = {
                name: place for unit in size.units for name, place in unit.trained.items() if ".lora_E." not in name
            }
            rows = sum(place.row_bounds(shards)[1] * place.columns for place in places.values())
            found.append(Collective("dp_shard", "all_gather", len(places), _element(config) * rows))
    if replicas > 1:
        counts = selected(size, config)
        if config.method == "lift":
            flat = sum(_width(unit, counts, shards) for unit in size.units)
            parts = sum(map(_parameters, size.units)) if config.optimizer.device == "cpu" else 1
            found.append(Collective("dp_replicate", "all_reduce", parts, 4 * flat))
        else:  # one for each parameter
            whole = sum(unit.padded(shards, trained=True) for unit in size.units)
            found.append(Collective("dp_replicate", "all_reduce", len(size.trained), _element(config) * whole))
    return [*found, *_copies(size, config, replicas, shards)] if config.optimizer.device == "cpu" else found


def _of_base(size: Sizes, config: Config, first: int) -> list[FSDPUnit]:
    """The units gathered for a forward of the base model; adapters leave gathered what the next forward takes: the last layers,
    from ``first`` on, and the root."""
    units = (
        (*size.layers, size.embedding, size.root) if config.method == "lift" else (*size.layers[:first], size.embedding)
    )
    return [unit for unit in units if unit.shapes]


def _copies(size: Sizes, config: Config, replicas: int, shards: int) -> list[Collective]:
    """What travels between a rank and its host, as engine/host.py says."""
    micro, counts = micro_batches(config, replicas * shards), selected(size, config)
    units = [unit for unit in size.units if unit.trained]
    reduced = [unit for unit in _needing_gradients(size, config) if unit.trained]
    exchanged = [unit for unit in reduced if _is_exchanged(unit, config, counts, shards)]

    def copies(operation: str, *parts: tuple[int, list[FSDPUnit], int]) -> Collective:
        """Of how often, of which units, bytes of an entry."""
        calls = sum(times * _parameters(unit) for times, found, _ in parts for unit in found)
        payload = sum(times * each * _width(unit, counts, shards) for times, found, each in parts for unit in found)
        return Collective("host", operation, calls, payload)

    values, between = (1, units, size.itemsize), (int(replicas > 1), units, 4)
    in_order = config.model.base_dtype is not None  # values are written without their positions
    to_base = int(config.optimizer.decay_towards == "base"), units, size.itemsize
    return [
        copies("to_host", (micro, reduced, 4), between, to_base),
        copies("to_device", (micro, reduced, 4), (micro, exchanged, 4), between, values, (int(not in_order), units, 4)),
    ]


def _parameters(unit: FSDPUnit) -> int:
    """How many of its parameters hold trained matrices."""
    return len({place.parameter for place in unit.trained.values()})


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
    """Floating-point operations per token in forward and backward, without recomputation; also in a forward of the base model, if
    the loss needs it."""
    idle = 1 - size.reached  # of the experts
    products = size.numel - size.embedding.numel - size.towers.numel - idle * size.experts  # an embedding is a lookup
    places = [place for unit in _needing_gradients(size, config) for place in unit.trained.values()]
    trained = sum(place.numel * (1 if place.is_whole else size.reached) for place in places)
    attention = 2 * len(size.layers) * size.query * config.data.max_length  # causal: half of all pairs, two products
    of_base = int(config.train.needs_base)
    return round(2 * ((2 + of_base) * products + trained)) + (3 + of_base) * attention
