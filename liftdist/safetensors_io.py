"""Tensors in the safetensors format: names of dtypes, bytes, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by their safetensors names


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of tensors, in the given order."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the host, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)
