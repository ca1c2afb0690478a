"""DARE (Yu et al. 2024, arXiv 2311.03099): drop changes at random, and rescale the others.

sum_i w_i M_i D_i / density        M_i: 1 with probability ``density``, else 0

Drawn for each tensor from ``seed`` and its changes, so that copies of a tensor, as of a tied head that is stored too, stay equal.
``peft.utils.merge_utils`` draws from the global generator, so that a result would depend on the order of tensors.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from liftdist import safetensors_io


def merge(differences: Tensor, *, weights: Tensor, density: float, seed: int = 0) -> Tensor:
    of_changes = hashlib.sha256(f"{seed} ".encode() + safetensors_io.bytes_of(differences)).digest()
    own_seed = int.from_bytes(of_changes[:8], "little", signed=True)
    chance = torch.Generator().manual_seed(own_seed)
    kept = torch.rand(differences.shape, generator=chance, dtype=torch.float64) < density
    return weights @ (differences * kept) / density
