"""Shapes of a model, by the modules that FSDP gathers together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liftdist.distributed.rows import row_bounds
from liftdist.engine.decoder import towers
from liftdist.engine.matrices import Place, principal_matrices
from liftdist.engine.quantisation import Format
from liftdist.engine.quantised import Sections
from liftdist.models import adapters, build
from liftdist.registry import METHODS
from liftdist.schema import Config


@dataclass(frozen=True)
class FSDPUnit:
    """An FSDP module: its parameters are gathered and reduced together."""

    shapes: tuple[tuple[int, ...], ...]  # of all parameters
    trained: Mapping[str, Place]  # the trained matrices, by name
    sections: tuple[Sections | None, ...] = ()  # of parameters that are quantised, without rows; nothing where none is
    frozen: tuple[bool, ...] = ()  # parameters that are neither trained nor quantised; nothing where none is

    def gathered(self, shards: int) -> FSDPUnit:
        """The same without what is not gathered: a single shard has what is frozen, and uses it where it is."""
        if shards > 1 or not any(self.frozen):
            return self
        sections = self.sections or [None] * len(self.shapes)
        kept = [
            pair
            for pair, frozen in zip(zip(self.shapes, sections, strict=True), self.frozen, strict=True)
            if not frozen
        ]
        shapes, of_them = zip(*kept, strict=True) if kept else ((), ())
        return dataclasses.replace(self, shapes=shapes, sections=of_them, frozen=())

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def trained_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the parameters with trained matrices."""
        return tuple({place.parameter: tuple(place.param.shape) for place in self.trained.values()}.values())

    def padded(self, shards: int, trained: bool = False) -> int:
        """Weights of the largest shard, to which every shard is padded; with ``trained``, of the trained matrices only."""
        shapes = self.trained_shapes if trained else self.shapes
        return sum(row_bounds(shape[0], shards)[1] * math.prod(shape[1:]) for shape in shapes)

    def kept(self, shards: int, itemsize: int, counts: Mapping[str, int]) -> int:
        """Bytes of the largest shard, as it is kept and gathered.

        Args:
            itemsize: bytes of a weight that is not quantised.
            counts: exact weights of each trained matrix, by name, that the shard holds.
        """
        exact: dict[tuple[int, ...], list[int]] = {}  # of each parameter, by its shape
        for parameter in {place.parameter: place.param for place in self.trained.values()}.items():
            of = [counts[name] for name, place in self.trained.items() if place.parameter == parameter[0]]
            exact.setdefault(tuple(parameter[1].shape), []).append(sum(of))
        total = 0
        for shape, sections in zip(self.shapes, self.sections or [None] * len(self.shapes), strict=True):
            rows = row_bounds(shape[0], shards)[1]
            if sections is None:
                total += rows * itemsize * math.prod(shape[1:])
            else:
                entries = exact[shape].pop() if exact.get(shape) else 0
                rows *= math.prod(shape[1:-1])
                total += dataclasses.replace(sections, rows=rows, entries=entries).bounds[-1]
        return total

    @property
    def codes(self) -> int:
        """Bytes of the codes of its largest matrix."""
        pairs = zip(self.shapes, self.sections, strict=bool(self.sections))
        return max((s.format.code_bytes * math.prod(shape[:-1]) for shape, s in pairs if s is not None), default=0)

    def needing_gradients(self, counts: Mapping[str, int]) -> FSDPUnit:
        """The same with those trained matrices alone whose parameter gets some of ``counts``, by name."""
        needed = {place.parameter for name, place in self.trained.items() if counts[name]}
        kept = {name: place for name, place in self.trained.items() if place.parameter in needed}
        return dataclasses.replace(self, trained=kept)


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
    adapted: frozenset[tuple[int, int]] = frozenset()  # shapes of the matrices with adapters

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
    every, kind = principal_matrices(model), config.model.base_dtype
    matrices = {id(place.param) for place in every.values()}
    trained: dict[int, dict[str, Place]] = {}  # by parameter
    for name, place in METHODS.load(config.method).places(config, model).items():
        trained.setdefault(id(place.param), {})[name] = place

    seen: set[int] = set()  # what several units share is counted once

    def unit(*modules: nn.Module) -> FSDPUnit:
        unique = {id(param): param for module in modules for param in module.parameters() if id(param) not in seen}
        seen.update(unique)
        chosen = {name: place for p in unique for name, place in trained.get(p, {}).items()}
        sections = [
            Sections(Format(kind, param.shape[-1]), 0, 0, param.dtype) if kind and p in matrices else None
            for p, param in unique.items()
        ]
        frozen = [p not in trained and not (kind and p in matrices) for p in unique]
        return FSDPUnit(tuple(tuple(p.shape) for p in unique.values()), chosen, tuple(sections), tuple(frozen))

    embedding = build.own_embedding(model)
    layers = tuple(unit(layer) for layer in build.decoder_layers(model))
    beside = unit(*towers(model))
    embedded = unit(*([] if embedding is None else [embedding]))
    rest, width = unit(model), _width_of_attention(model.config)
    buffers = sum(t.nbytes for t in build.tensors(model).values() if not isinstance(t, nn.Parameter))
    fused = {id(place.param): place.param for place in every.values() if place.param.ndim > 2}
    weights = sum(param.numel() for param in fused.values())
    reached = _reached(model.config, next(iter(fused.values())).shape[0]) if fused else 1.0
    adapted = adapters.layers(model).values() if config.method == "lora" else ()
    shapes = frozenset(tuple(layer.base_layer.weight.shape) for layer in adapted)
    return Sizes(layers, embedded, rest, beside, model.dtype.itemsize, width, buffers, weights, reached, shapes)


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
