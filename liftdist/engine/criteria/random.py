"""Random entries, the baseline of every other choice.

S = k entries, uniformly at random by the seed of the matrix and `selection.seed`: the same on any world size, and at a refresh
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liftdist.engine.scores import Scored, Scores


@dataclass(frozen=True)
class Random(Scored):
    """Depends on the name and the shape of a matrix.

    Args:
        seed: another seed draws other entries.
    """

    seed: int = 0

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:
        drawn = np.random.default_rng([self.seed, seed]).random(weight.numel(), dtype=np.float32)
        values = torch.from_numpy(drawn).view(weight.shape).to(weight.device)
        return lambda rows: values[rows]


def make(settings: Any) -> Random:
    """From the setting ``seed``."""
    return Random(settings.seed or 0)
