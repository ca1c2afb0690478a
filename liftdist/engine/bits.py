"""Flags in one bit each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pack(flags: Tensor) -> Tensor:
    """``[ceil(n / 8)]`` uint8, one bit for each element of ``flags [n]`` bool."""
    padded = nn.functional.pad(flags, (0, -flags.numel() % 8)).view(-1, 8)
    bits = torch.zeros(padded.shape[0], dtype=torch.uint8, device=flags.device)
    for place in range(8):
        bits |= padded[:, place].to(torch.uint8) << place
    return bits


def unpack(packed: Tensor, size: int) -> Tensor:
    """``[size]`` bool, the inverse of :func:`pack`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> places) & 1).view(-1)[:size].bool()
