"""Sorted indices as bytes: the gaps between them as LEB128 numbers, seven bits per byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def encode(indices: Tensor) -> Tensor:
    """``[bytes]`` uint8, LEB128: seven bits per byte, lowest first; the eighth is set in all but a number's last byte."""
    gaps = np.diff(indices.numpy(), prepend=0).astype(np.uint64)
    lengths = np.ones(len(gaps), dtype=np.int64)
    for bits in range(7, 63, 7):
        lengths += gaps >= (1 << bits)
    ends = np.cumsum(lengths)
    coded = np.zeros(-(-int(ends[-1]) // 8) * 8 if len(ends) else 0, dtype=np.uint8)  # aligns the next tensor
    for place in range(int(lengths.max(initial=0))):
        chosen = lengths > place
        more = (lengths[chosen] > place + 1).astype(np.uint8) << 7
        digit = ((gaps[chosen] >> np.uint64(7 * place)) & np.uint64(127)).astype(np.uint8)
        coded[ends[chosen] - lengths[chosen] + place] = digit | more
    return torch.from_numpy(coded)


def decode(coded: Tensor, count: int) -> Tensor:
    """``[count]`` int64. Raises ``ValueError`` if the number of indices is another, or they do not ascend."""
    raw = coded.numpy()
    ends = np.flatnonzero(raw < 128)[:count] + 1
    if len(ends) != count or len(raw) - (int(ends[-1]) if count else 0) >= 8:
        raise ValueError(f"the number of indices is not {count}, as the metadata states")
    if count == 0 or int(ends[-1]) == count:  # of one byte each
        gaps = raw[:count].astype(np.int64)
    else:
        starts = np.concatenate([[0], ends[:-1]])
        gaps = raw[starts].astype(np.int64) & 127
        lengths = ends - starts
        if lengths.max(initial=0) > 9:
            raise ValueError("an index is out of range")
        for place in range(1, int(lengths.max(initial=0))):  # few numbers have so many
            longer = np.flatnonzero(lengths > place)
            gaps[longer] |= (raw[starts[longer] + place].astype(np.int64) & 127) << (7 * place)
    indices = np.cumsum(gaps)
    if count and (indices[0] < 0 or (count > 1 and (indices[1:] <= indices[:-1]).any())):
        raise ValueError("indices do not ascend")
    return torch.from_numpy(indices)
