"""Whole channels at random: the hidden units of an MLP, the channels of attention.

C = channels, in random order: rows of the matrices that make them, columns of those that read them (the other way round where
    a matrix is stored transposed); the same for all of a module
S = the first channels until there are k entries; of the last one the first entries         (S2FT, arXiv 2412.06289)

S2FT draws whole heads in attention. Here `block_size` says it: 1, the default, draws single channels there, too; with the size of
a head, runs of that many adjacent channels are in random order, the channels of a run in their own. q and o have the same heads,
and k and v; of these grouped queries have fewer, which are drawn apart: they need not be those that the drawn queries read. A
module is attention if its name says so (self_attn, attention, ...). S2FT permutes weights so that what is trained is one dense
slice; here the entries stay where they are.

A module is refused if its makers do not have the channels of its reader, as where one matrix makes gate and up, or q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftdist.engine.matrices import Matrix, Place
from liftdist.engine.scores import Scored, Scores
from liftdist.engine.selection import seed_of
from liftdist.errors import UserError

#: Modules that read the channels of others, by the names that architectures have for them.
READERS = (
    *("down_proj", "o_proj", "out_proj", "wo", "w2", "c_proj", "fc2", "fc_out", "dense", "dense_4h_to_h", "fc_o"),
    *("proj_down", "output_linear", "linear_out", "output"),
)


@dataclass(frozen=True)
class Channels:
    """
    Args:
        seed: another seed draws other channels.
        block_size: how many adjacent channels of attention are drawn together.
    """

    seed: int = 0
    block_size: int = 1

    def of(self, matrix: Matrix, refreshes: int) -> Scored:
        """The criterion of a matrix: its module and its kind decide."""
        module, kind = _module_and_kind(matrix.name)
        size = self.block_size if _is_attention(module) else 1
        return _Shuffled(self.seed, seed_of(module), _axis(kind, matrix.place), size)

    def check(self, places: Mapping[str, Place]) -> None:
        """Raises ``UserError`` for a module whose matrices do not share channels. Of attention some may have fewer: k and v."""
        modules: dict[str, dict[str, Place]] = {}
        for name, place in places.items():
            module, kind = _module_and_kind(name)
            modules.setdefault(module, {})[kind] = place
        for module, kinds in modules.items():
            sizes = {kind: place.shape[_axis(kind, place)] for kind, place in kinds.items()}
            reads = {size for kind, size in sizes.items() if kind in READERS}
            read = max(reads, default=0)
            for kind, size in sizes.items():
                if reads and size != read and not (_is_attention(module) and size < read):
                    what = f"makes {size} channels, where {read} are read"
                    raise UserError(_refusal(f"{module}.{kind}", what))
            inputs = {place.shape[1 - _axis(kind, place)] for kind, place in kinds.items()}
            if not reads and len(inputs) > 1:
                raise UserError(_refusal(module, f"{', '.join(kinds)}: which of them reads the others is not known"))


@dataclass(frozen=True)
class _Shuffled(Scored):
    seed: int
    module: int
    axis: int  # that of the channels
    block_size: int

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        channels, size = weight.shape[self.axis], self.block_size
        if channels % size:
            raise ValueError(
                f"selection.block_size must divide its {channels} channels, got {size}; give the size of a head, or unset it"
            )
        order = np.random.default_rng([self.seed, self.module]).permutation(channels // size)
        places = size * order[:, None] + np.arange(size, 0, -1)  # the first of a run before the others
        ranks = torch.from_numpy(places).flatten().float().to(weight.device)
        scores = (ranks if self.axis else ranks[:, None]).expand(weight.shape)
        return lambda rows: scores[rows]


def _module_and_kind(name: str) -> tuple[str, str]:
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    return module, kind


def _is_attention(module: str) -> bool:
    return any(name in module.rpartition(".")[2].lower() for name in ("attn", "attention"))


def _axis(kind: str, place: Place) -> int:
    """The axis along which a matrix has the channels of its module: 0 rows, 1 columns."""
    return int((kind in READERS) != place.is_transposed)


def _refusal(of: str, what: str) -> str:
    return (
        f"{of}: {what}, so that selection.criterion=channels cannot train channels; leave it out of selection.modules"
    )


def make(settings: Any) -> Channels:
    """From the settings ``seed`` and ``block_size``."""
    return Channels(settings.seed or 0, settings.block_size or 1)
