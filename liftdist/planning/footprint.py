"""What a rank holds and sends in a run, by formulas over the shapes of a model.

For S shards, R replicas, P parameters of which N are trained, density d, all on the fullest rank:

    weights      2 P / S                            and the root whole: head, norm, and an embedding tied to the head
    principal    20 d N / S                         values, gradient, two moments 16 B; indices 4 B
    once principal  N / (8 S)                       a bit, from the first refresh on
    layers       one layer gathered, and of one more its gradient, as it is and as it is laid out to be reduced
    activations  what one layer keeps for its backward, times layers; found by running two layers on fake tensors

What travels is counted as a ring sends it: all-gather and reduce-scatter of n bytes n (S - 1) / S, all-reduce twice that.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils

from liftdist.distributed.sharding import row_bounds
from liftdist.engine.matrices import principal_parameters
from liftdist.errors import UserError
from liftdist.models import build
from liftdist.models.head import in_chunks
from liftdist.planning.live_bytes import LiveBytes
from liftdist.registry import BUDGETS, CRITERIA
from liftdist.schema import Config
from liftdist.training.losses.cross_entropy import summed


@dataclass(frozen=True)
class FSDPUnit:
    """An FSDP module: what is gathered and reduced together."""

    shapes: tuple[tuple[int, ...], ...]  # of all parameters
    trained: Mapping[str, tuple[int, int]]  # of the trained matrices, by name

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def padded(self, shards: int, trained: bool = False) -> int:
        """Weights that the fullest shard holds, and that every shard is padded to."""
        shapes = self.trained.values() if trained else self.shapes
        return sum(row_bounds(shape[0], shards)[1] * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Sizes:
    """A model as the planner sees it."""

    layers: tuple[FSDPUnit, ...]
    embedding: FSDPUnit  # empty where it is the head, too, and in the root
    root: FSDPUnit
    itemsize: int  # bytes of a weight
    query: int  # attention's width: heads x head dim

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @property
    def trained(self) -> dict[str, tuple[int, int]]:
        return {name: shape for unit in self.units for name, shape in unit.trained.items()}

    @property
    def units(self) -> tuple[FSDPUnit, ...]:
        return *self.layers, self.embedding, self.root


def sizes(model: PreTrainedModel, patterns: Sequence[str]) -> Sizes:
    """Of a model that needs no memory. Raises ``UserError``: no module fits the patterns."""
    trained = {id(param): name for name, param in principal_parameters(model, patterns).items()}

    def unit(params: Iterator[nn.Parameter]) -> FSDPUnit:
        unique = list({id(param): param for param in params}.values())
        chosen = {trained[id(p)]: (p.shape[0], p.shape[1]) for p in unique if id(p) in trained}
        return FSDPUnit(tuple(tuple(p.shape) for p in unique), chosen)

    layers, embedding = build.decoder_layers(model), build.own_embedding(model)
    looked_up = list(embedding.parameters()) if embedding is not None else []
    inside = {id(param) for param in (*layers.parameters(), *looked_up)}
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        tuple(unit(layer.parameters()) for layer in layers),
        unit(iter(looked_up)),
        unit(param for param in model.parameters() if id(param) not in inside),
        next(model.parameters()).element_size(),
        width * text.num_attention_heads,
    )


class Activations(NamedTuple):
    """Bytes that a micro-batch keeps alive."""

    fixed: int  # whatever the number of layers
    layer: int  # for each layer, from its forward to its backward
    loss: int  # besides, while the loss is computed
    backward: int  # besides, while one layer's backward runs


def activations(hf_config: Any, config: Config, rows: int) -> Activations:
    """Of ``rows`` sequences: the real model with one and two layers, run forward and backward on tensors without memory."""
    kept, losses, backwards = [], [], []
    for layers in (1, 2):
        live = LiveBytes()
        with FakeTensorMode(allow_non_fake_inputs=True), packing_known(config.data.packing), live:
            model = build.build(_with_layers(hf_config, layers), config.model).to_empty(device="cpu").train()
            build.recompute(model, config.model)
            trained = {id(param) for param in _trained(model, config.selection.modules)}
            for param in model.parameters():
                param.requires_grad_(id(param) in trained)
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            shape = (rows, config.data.max_length)
            tokens = torch.zeros(shape, dtype=torch.int64)
            before = live.peak = live.now
            in_chunks(model)
            total = model.chunked_loss(tokens, None, torch.arange(shape[1]), tokens, summed)
            kept.append(live.now - before)
            losses.append(live.peak - live.now)
            live.peak = live.now
            total.backward()
            backwards.append(live.peak - before - kept[-1])
    layer = kept[1] - kept[0]
    return Activations(kept[0] - layer, layer, losses[1], backwards[1])


def _trained(model: PreTrainedModel, patterns: Sequence[str]) -> list[nn.Parameter]:
    try:
        return list(principal_parameters(model, patterns).values())
    except UserError:  # they name later layers
        return list(principal_parameters(model).values())


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

    def whole(unit: FSDPUnit) -> int:
        return size.itemsize * unit.padded(shards) * shards

    gathered, embedding, root = max(map(whole, size.layers)), whole(size.embedding), whole(size.root)
    reduced = max(unit.padded(shards, trained=True) * shards for unit in size.units)
    largest = max(m * n for m, n in size.trained.values())
    counts = selected(size, config)
    workspace = criterion(config).workspace
    factoring = max(workspace(*shape, counts[name]) for name, shape in size.trained.items())
    sent = size.itemsize if shards > 1 and config.mesh.sparse_reduce_scatter else 4  # of a gradient to be reduced
    exchanged = max(16 * shards * _width(unit, counts, shards) for unit in size.units) if shards > 1 else 0
    return {
        "weights": size.itemsize * sum(unit.padded(shards) for unit in size.units),
        "principal": 20 * sum(-(-count // shards) for count in counts.values()),
        "once principal": sum(unit.padded(shards, trained=True) for unit in size.units) // 8
        if config.selection.refresh_interval
        else 0,
        "root, whole": root,
        # in the first forward, besides the root: what arrives is held twice, and once until the next has arrived
        "arriving": max(root + 2 * embedding, (embedding or root) + 2 * gathered),
        # the next layer is gathered while one is computed; that one is gone when its gradients are copied to be reduced
        "layers, whole": gathered
        + max(gathered + size.itemsize * reduced, (size.itemsize + sent) * reduced + 4 * reduced // shards + exchanged),
        "activations": kept.fixed + len(size.layers) * kept.layer,
        "computing": kept.backward,
        "loss": kept.loss,
        # this matrix and the next as gathered, and the rows sent for that
        "selecting": (3 * size.itemsize * largest if shards > 1 else 0) + factoring,
    }


def peak(parts: dict[str, int]) -> int:
    """Bytes at the worst moment of a run: training, or selecting."""
    held = parts["weights"] + parts["principal"] + parts["once principal"]
    backward = parts["layers, whole"] + parts["computing"]
    training = parts["root, whole"] + parts["activations"] + max(backward, parts["loss"])
    gathering = parts["root, whole"] + parts["arriving"]
    return held + max(training, gathering, parts["selecting"])


def criterion(config: Config) -> Any:
    """What selects the weights: see :class:`liftdist.engine.selection.Criterion`."""
    return CRITERIA.load(config.selection.criterion).make(config.selection)


def selected(size: Sizes, config: Config) -> dict[str, int]:
    """Weights to train of each matrix, by name."""
    allotted: dict[str, int] = BUDGETS.load(config.selection.budget).make(config.selection).allot(size.trained)
    return allotted


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
        once = [unit for unit in (size.embedding, size.root) if unit.shapes]
        calls = 2 * len(size.layers) + len(once)
        gathered = sum(unit.padded(shards) for unit in (*size.layers, *size.layers, *once))
        found.append(Collective("dp_shard", "all_gather", micro * calls, micro * size.itemsize * gathered))
        reduced = [unit for unit in size.units if unit.trained]
        counts = selected(size, config)
        widths = [_width(unit, counts, shards) for unit in reduced]
        dense = [4 * shards * unit.padded(shards, trained=True) for unit in reduced]
        sparse = [config.mesh.sparse_reduce_scatter and 8 * w < d // shards for w, d in zip(widths, dense, strict=True)]
        where = sum(4 * width for width, chosen in zip(widths, sparse, strict=True) if chosen)
        what = sum(4 * shards * w if chosen else d for w, d, chosen in zip(widths, dense, sparse, strict=True))
        if any(sparse):
            found.append(Collective("dp_shard", "all_gather", micro * sum(sparse), micro * where))
        found.append(Collective("dp_shard", "reduce_scatter", micro * len(reduced), micro * what))
    if replicas > 1:
        flat = 4 * sum(-(-count // shards) for count in selected(size, config).values())
        found.append(Collective("dp_replicate", "all_reduce", 1, flat))
    return found


def _width(unit: FSDPUnit, counts: Mapping[str, int], shards: int) -> int:
    """Principal weights of a unit that a shard holds, if they are spread evenly."""
    return sum(-(-counts[name] // shards) for name in unit.trained)


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches of the rank that has the most sequences of a step."""
    return math.ceil(math.ceil(config.train.batch_size / ranks) / config.train.micro_batch_size)


def rows(config: Config, ranks: int) -> int:
    """Sequences that a rank computes at once, at most."""
    return min(config.train.micro_batch_size, math.ceil(config.train.batch_size / ranks))


def operations(size: Sizes, config: Config) -> int:
    """Floating-point operations of a token in forward and backward, without what is computed twice."""
    products = size.numel - size.embedding.numel  # which is looked up
    trained = sum(m * n for m, n in size.trained.values())
    attention = 2 * len(size.layers) * size.query * config.data.max_length  # causal: half of all pairs, two products
    return 2 * (2 * products + trained) + 3 * attention
