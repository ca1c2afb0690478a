"""Formats in which frozen weights take 8 or 4 bits. Rows are quantised apart: they are the same on any number of ranks.

    int8    code / 127 of the largest magnitude in a block of 64 columns                       1.031 B a weight
    fp8     float8_e4m3 whose largest value, 448, is the largest magnitude in the row          1 B
    nf4     the nearest of 16 quantiles of a normal distribution, in units of the largest      0.531 B
            magnitude in a block of 64 columns (QLoRA, arXiv 2305.14314, appendix E)

Scales are bfloat16, and weights are quantised by the rounded scale. A weight is ``code * scale``, rounded once to the dtype of
the model: the same on any device. QLoRA's second quantisation, of the scales, is left out: its groups would span rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 64  # columns that share a scale
AT_ONCE = 1 << 22  # bytes of codes whose levels are looked up at a time, by indices of 4 B

#: The levels of NF4, as QLoRA's authors publish them.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Format:
    """How rows of ``columns`` weights are kept: codes ``[m, code_bytes]`` uint8 and scales ``[m, blocks]`` bfloat16."""

    name: str  # int8, fp8 or nf4
    columns: int

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.columns if self.name == "fp8" else BLOCK

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def padded(self) -> int:
        """Columns for which there are codes."""
        return self.blocks * self.block

    @property
    def code_bytes(self) -> int:
        """Of a row."""
        return self.padded // 2 if self.name == "nf4" else self.padded

    @property
    def row_bytes(self) -> int:
        """Of codes and scales."""
        return self.code_bytes + 2 * self.blocks

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of ``rows [m, n]``, which are finite."""
        blocks = nn.functional.pad(rows.float(), (0, self.padded - self.columns)).view(-1, self.blocks, self.block)
        # a tensor: by a Python number GPUs divide as the product with its reciprocal, which rounds differently
        limit = blocks.new_full((), {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}[self.name])
        scales = (blocks.abs().amax(2, keepdim=True) / limit).bfloat16()
        units = blocks / torch.where(scales == 0, 1, scales).float()
        if self.name == "int8":
            codes = units.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
        elif self.name == "fp8":
            codes = units.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            levels = torch.tensor(NF4, device=rows.device)
            nearest = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
            codes = nearest[..., ::2] << 4 | nearest[..., 1::2]
        return codes.view(-1, self.code_bytes), scales.view(-1, self.blocks)

    def dequantise(self, codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        """Write the weights of ``codes`` and ``scales``, see :meth:`quantise`, to ``out [m, n]``, contiguous, in its dtype."""
        whole = out if self.padded == self.columns else out.new_empty(out.shape[0], self.padded)
        if self.name == "nf4":
            of_pairs = torch.int32 if out.element_size() == 2 else torch.int64  # two weights
            pairs = _pairs_of_levels(out.dtype, out.device).view(of_pairs).view(-1)
            parts = codes.flatten().split(AT_ONCE), whole.view(-1).view(of_pairs).split(AT_ONCE)
            for part, into in zip(*parts, strict=True):
                torch.index_select(pairs, 0, part.int(), out=into)
        else:
            whole.copy_(codes.view(torch.int8 if self.name == "int8" else torch.float8_e4m3fn))
        whole.view(-1, self.blocks, self.block).mul_(scales.to(out.dtype).unsqueeze(2))
        if whole is not out:
            out.copy_(whole[:, : self.columns])
        return out

    def rounded(self, rows: Tensor) -> Tensor:
        """``rows [m, n]`` as they are after they have been quantised, in their dtype."""
        return self.dequantise(*self.quantise(rows), torch.empty_like(rows))

    def dequantise_at(self, codes: Tensor, scales: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """``[k]``: the weights at flat ``positions [k]``, as :meth:`dequantise` gives them."""
        row = positions // self.columns
        column = positions - row * self.columns
        scale = scales[row, column // self.block].to(dtype)
        if self.name == "nf4":
            pair = codes[row, column // 2]
            codes = torch.where(column % 2 == 0, pair >> 4, pair & 15)
            return torch.tensor(NF4, dtype=dtype, device=codes.device)[codes.int()] * scale
        kind = torch.int8 if self.name == "int8" else torch.float8_e4m3fn
        return codes[row, column].view(kind).to(dtype) * scale


_PAIRS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _pairs_of_levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[256, 2]``: the two weights of each byte, the first in its high bits. Made once: the host waits for the copy to a GPU."""
    if (dtype, device) in _PAIRS:
        return _PAIRS[dtype, device]
    levels = torch.tensor(NF4, dtype=dtype)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).to(device)
    if type(pairs) is Tensor:  # no fake one, of which only its mode can make use
        _PAIRS[dtype, device] = pairs
    return pairs
