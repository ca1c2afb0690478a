"""Exponential moving average of models in the order given, such as the checkpoints of a run.

E_1 = D_1        E_i = decay E_{i-1} + (1 - decay) D_i        the merged difference is E_n
"""

from __future__ import annotations

from torch import Tensor


def merge(differences: Tensor, *, decay: float) -> Tensor:
    average = differences[0]
    for difference in differences[1:]:
        average = decay * average + (1 - decay) * difference
    return average
