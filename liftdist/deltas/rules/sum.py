"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): ``sum_i w_i D_i``. A negative weight takes a task away."""

from __future__ import annotations

from torch import Tensor


def merge(differences: Tensor, *, weights: Tensor) -> Tensor:
    return weights @ differences
