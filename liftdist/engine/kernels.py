"""Triton kernels. Import this module only where Triton is installed and the tensors are on its device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw_and_write_back(
    segments,  # [parameters, 4] int64: begin in the flat vector, entries, address of positions (int32), address of weights
    scales,  # [2] float32: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    values,  # [k_local] float32, as are the next three
    gradient,
    first,
    second,
    beta1,
    beta2,
    eps,
    decay,  # lr * weight_decay
    WEIGHT: tl.constexpr,  # dtype of the weights
    BLOCK: tl.constexpr,
):
    """AdamW (arXiv 1711.05101) on a block of entries of one parameter; writes their weights and clears their gradient."""
    segment = segments + 4 * tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(segment + 1)
    at = tl.load(segment) + place
    g = tl.load(gradient + at, mask=inside)
    m = tl.load(first + at, mask=inside)
    v = tl.load(second + at, mask=inside)
    x = tl.load(values + at, mask=inside)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    x = x - decay * x
    x = x - tl.load(scales) * m / (tl.sqrt(v) * tl.load(scales + 1) + eps)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(values + at, x, mask=inside)
    tl.store(gradient + at, 0.0, mask=inside)
    index = tl.load(tl.load(segment + 2).to(tl.pointer_type(tl.int32)) + place, mask=inside)
    tl.store(tl.load(segment + 3).to(tl.pointer_type(WEIGHT)) + index, x.to(WEIGHT), mask=inside)
