"""Whole channels at random: the hidden units of an MLP, the channels of attention.

C = channels, in random order: rows of the matrices that make them, columns of those that read them; the same for all of a module
S = the first channels until there are k entries; of the last one the first entries         (S2FT, arXiv 2412.06289)

S2FT draws whole heads in attention, which `block_size`, the size of a head, does here: runs of that many adjacent channels are in
random order, the channels of a run in their own. q and o have the same heads, and k and v, of which grouped queries have fewer. A
module is attention if its name says so (self_attn, attention, ...). S2FT permutes weights so that what is trained is one dense
slice; here the entries stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftdist.engine.matrices import Matrix
from liftdist.engine.scores import Scored, Scores
from liftdist.engine.selection import seed_of

#: Modules that read the channels of others, by the names that architectures have for them.
READERS = ("down_proj", "o_proj", "out_proj", "wo", "w2", "c_proj", "fc2", "fc_out", "dense", "dense_4h_to_h", "fc_o")


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
        module, _, kind = matrix.name.removesuffix(".weight").rpartition(".")
        is_attention = any(name in module.rpartition(".")[2].lower() for name in ("attn", "attention"))
        return _Shuffled(self.seed, seed_of(module), kind in READERS, self.block_size if is_attention else 1)


@dataclass(frozen=True)
class _Shuffled(Scored):
    seed: int
    module: int
    is_reader: bool
    block_size: int

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        channels, size = weight.shape[int(self.is_reader)], self.block_size
        if channels % size:
            raise ValueError(
                f"selection.block_size must divide its {channels} channels, got {size}; give the size of a head, or unset it"
            )
        order = np.random.default_rng([self.seed, self.module]).permutation(channels // size)
        places = size * order[:, None] + np.arange(size, 0, -1)  # the first of a run before the others
        ranks = torch.from_numpy(places).flatten().float().to(weight.device)
        scores = (ranks if self.is_reader else ranks[:, None]).expand(weight.shape)
        return lambda rows: scores[rows]


def make(settings: Any) -> Channels:
    """From the settings ``seed`` and ``block_size``."""
    return Channels(settings.seed or 0, settings.block_size or 1)
