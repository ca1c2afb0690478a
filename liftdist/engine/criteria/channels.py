"""Whole channels at random: the hidden units of an MLP, the channels of attention.

C = channels, in random order: rows of the matrices that make them, columns of those that read them; the same for all of a module
S = the first channels until there are k entries; of the last one the first entries         (S2FT, arXiv 2412.06289)

S2FT draws whole heads in attention, and permutes weights so that what is trained is one dense slice. Here channels of attention
are drawn singly, and the entries stay where they are.
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
    """

    seed: int = 0

    def of(self, matrix: Matrix, refreshes: int) -> Scored:
        """The criterion of a matrix: its module and its kind decide."""
        module, _, kind = matrix.name.removesuffix(".weight").rpartition(".")
        return _Shuffled(self.seed, seed_of(module), kind in READERS)


@dataclass(frozen=True)
class _Shuffled(Scored):
    seed: int
    module: int
    is_reader: bool

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        axis = int(self.is_reader)
        order = np.random.default_rng([self.seed, self.module]).permutation(weight.shape[axis])
        ranks = torch.from_numpy(order + 1.0).float().to(weight.device)
        scores = (ranks if self.is_reader else ranks[:, None]).expand(weight.shape)
        return lambda rows: scores[rows]


def make(settings: Any) -> Channels:
    """From the setting ``seed``."""
    return Channels(settings.seed or 0)
