"""Weights that a checkpoint holds quantised, read as the weights that they stand for.

    weight = code * scale of its block, in float32, rounded once to the dtype that ``config.json`` names

A tensor NAME of the model is several of the checkpoint; which, tells the format:

    mxfp4          NAME_blocks [E, n, g, 16] uint8: 32 codes of 4 bits (e2m1), the lower half of a byte first
                   NAME_scales [E, n, g] uint8: powers of two, biased by 127         NAME is [E, 32 g, n], transposed
    fp8            NAME [..., m, n] float8                                           NAME_scale_inv [..., m / a, n / b]
    compressed     NAME [..., m, n] float8                                           NAME_scale [m, 1] or one for all
    bitsandbytes   NAME [m n / 2, 1]: codes of 4 bits, the upper half of a byte first, of which NAME.quant_map [16] has the values
                   NAME.absmax [m n / c]: scales of c weights that follow each other, in any rows; in 8 bits themselves where
                   NAME.nested_absmax, NAME.nested_quant_map [256] are there     NAME.quant_state.bitsandbytes__nf4: a JSON object

``fp8`` has blocks of ``weight_block_size`` = [a, b], those at the end of rows and columns cut; without it, one scale for each
matrix or each row. Sources: OCP Microscaling Formats 1.0 and openai/gpt-oss, ``gpt_oss/torch/weights.py``;
deepseek-ai/DeepSeek-V3, ``inference/kernel.py``; vllm-project/compressed-tensors, ``naive_quantized``; bitsandbytes,
``functional.py``, ``QuantState``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liftdist.errors import UserError
from liftdist.models import check

AT_ONCE = 1 << 22  # weights that are made at a time, in float32, but 32 rows at least

#: ``(name, begin, end)``: rows of a tensor of the checkpoint, as :meth:`liftdist.safetensors_io.TensorFile.rows`.
Read = Callable[[str, int, int], Tensor]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BNB_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Quantised:
    """A tensor ``[..., m, n]`` that is stored quantised.

    Args:
        parts: the names of what is stored of it; the first is in the file where it is counted.
        dtype: of the weights that it stands for.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, read: Read, begin: int, end: int) -> Tensor:
        """``[end - begin, n]``: rows of it, seen as ``[all, n]``."""
        found = torch.empty(end - begin, self.shape[-1], dtype=self.dtype)
        for first, last in self.pieces(begin, end):
            found[first - begin : last - begin] = self.values(read, first, last)
        return found

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The rows from ``begin`` to ``end`` in parts that :meth:`values` makes: each is of one matrix, which is cut at multiples
        of 32 rows where it has more than is made at a time."""
        height, columns = self.shape[-2:]
        at_once = max(1, AT_ONCE // columns // 32) * 32
        while begin < end:
            row = begin % height
            last = min(end, begin - row + min(height, row - row % at_once + at_once))
            yield begin, last
            begin = last

    def values(self, read: Read, begin: int, end: int) -> Tensor:
        """``[end - begin, n]`` in float32 or, rounded, in ``dtype``: rows of one of :meth:`pieces`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mxfp4(Quantised):
    """``[E, m, n]``, stored as ``[E, n, m]``: each stored row has a weight of every row here."""

    def values(self, read: Read, begin: int, end: int) -> Tensor:
        expert, (inputs, outputs) = begin // self.shape[-2], self.shape[-2:]
        first, last = begin - expert * inputs, end - expert * inputs
        groups, used = inputs // 32, slice(first // 32, -(-last // 32))
        blocks, scales = self.parts
        of_expert = expert * outputs, (expert + 1) * outputs
        codes = read(blocks, of_expert[0] * groups, of_expert[1] * groups).view(outputs, groups, 16)[:, used]
        values = _nibbles(codes, torch.tensor(_E2M1), low_first=True)
        values *= _floats(read(scales, *of_expert)[:, used]).unsqueeze(2)
        # rounded first: half the bytes to transpose
        return values.to(self.dtype).flatten(1)[:, first - used.start * 32 : last - used.start * 32].T


@dataclass(frozen=True)
class Blocks(Quantised):
    """Float8 with a scale for each block of ``block`` rows and columns of a matrix."""

    block: tuple[int, int]

    def values(self, read: Read, begin: int, end: int) -> Tensor:
        weight, scale, *_ = self.parts
        rows, columns = self.shape[-2:]
        down, across = (-(-size // block) for size, block in zip((rows, columns), self.block, strict=True))
        row = torch.arange(begin, end)
        of_row = row // rows * down + row % rows // self.block[0]  # the row of scales
        first, last = int(of_row[0]), int(of_row[-1]) + 1
        scales = _floats(read(scale, first, last)).view(-1, across)[of_row - first]
        return read(weight, begin, end).float().mul_(scales.repeat_interleave(self.block[1], 1)[:, :columns])


@dataclass(frozen=True)
class Bnb(Quantised):
    """4 bits of bitsandbytes: blocks of ``block`` weights in the order of memory."""

    itemsize: int  # bytes of an element of the packed tensor
    block: int
    nested: tuple[int, float] | None  # scales that share one, and what is added to each

    def values(self, read: Read, begin: int, end: int) -> Tensor:
        columns = self.shape[-1]
        first, last = begin * columns // self.block, -(-end * columns // self.block)
        ends = min(last * self.block, math.prod(self.shape))
        packed = read(self.name, *(-(-at // (2 * self.itemsize)) for at in (first * self.block, ends)))
        levels = read(f"{self.name}.quant_map", 0, 16)
        values = _nibbles(packed.view(torch.uint8).flatten(), levels, low_first=False).flatten()
        values = values[: ends - first * self.block].mul_(self._scales(read, first, last)[: ends - first * self.block])
        skipped = begin * columns - first * self.block
        return values[skipped : skipped + (end - begin) * columns].view(-1, columns)

    def _scales(self, read: Read, first: int, last: int) -> Tensor:
        """Of the weights in the blocks from ``first`` to ``last``, one each."""
        scales = read(f"{self.name}.absmax", first, last)
        if self.nested is not None:
            size, offset = self.nested
            begin = first // size
            outer = read(f"{self.name}.nested_absmax", begin, -(-last // size)).repeat_interleave(size)
            levels = read(f"{self.name}.nested_quant_map", 0, 256)
            scales = levels[scales.int()] * outer[first - begin * size :][: len(scales)] + offset
        return scales.repeat_interleave(self.block)


def find(config: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], read: Read) -> dict[str, Quantised]:
    """What a checkpoint holds quantised, by the names that the model has for it; nothing unless its settings name a format.

    Args:
        config: the contents of ``config.json``.
        entries: ``dtype`` and ``shape`` of each tensor of the checkpoint.

    Raises:
        UserError: the parts of a tensor do not fit each other, or there are none, whatever the settings say.
    """
    settings = check.quantisation(config)
    if settings is None or check.why_unread(settings) is not None:
        return {}
    dtype, block = _dtype(config), _block_size(settings)
    found: list[Quantised] = []
    for name, entry in entries.items():
        try:
            if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in entries:
                found.append(_mxfp4(name.removesuffix("_blocks"), entries, dtype))
            elif _BNB_STATE in name:
                found.append(_bnb(name.partition(_BNB_STATE)[0], name, entries, read))
            elif entry["dtype"].startswith("F8_E") and entry["dtype"] != "F8_E8M0":
                scale = next((key for key in (f"{name}_scale_inv", f"{name}_scale") if key in entries), None)
                if scale is not None:
                    found.append(_blocks(name, scale, entries, dtype, block))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{name}: its parts do not fit each other ({error}): damaged, or in a form that is not read; take the "
                "unquantised model"
            ) from None
    if not found:
        raise UserError(
            f"config.json names quantised weights ({settings['quant_method']}), of which the files hold none; remove its "
            "quantization_config if they are meant"
        )
    return {tensor.name: tensor for tensor in found}


def _mxfp4(name: str, entries: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> Mxfp4:
    parts = f"{name}_blocks", f"{name}_scales"
    blocks, scales = (entries[part] for part in parts)
    experts, outputs, groups, size = blocks["shape"]
    if scales["shape"] != [experts, outputs, groups] or size != 16 or {blocks["dtype"], scales["dtype"]} != {"U8"}:
        raise ValueError(f"{blocks['dtype']} {blocks['shape']} with scales {scales['dtype']} {scales['shape']}")
    return Mxfp4(name, parts, (experts, groups * 32, outputs), dtype)


def _blocks(
    name: str, scale: str, entries: Mapping[str, Mapping[str, Any]], dtype: torch.dtype, block: tuple[int, int] | None
) -> Blocks:
    *outer, rows, columns = shape = tuple(entries[name]["shape"])
    given = entries[scale]["shape"]
    for size in filter(None, (block, (rows, columns), (1, columns))):
        grid = [-(-rows // size[0]), -(-columns // size[1])]
        of_rows = len(given) < 2 and grid[1] == 1 and math.prod(given) == math.prod(outer) * grid[0]
        if given == [*outer, *grid] or of_rows:
            of_inputs = (name.rpartition(".")[0] + key for key in (".activation_scale", ".input_scale"))
            parts = name, scale, *(part for part in of_inputs if part in entries)
            return Blocks(name, parts, shape, dtype, size)
    raise ValueError(f"{list(shape)} with scales {given}, weight_block_size {block}")


def _bnb(name: str, state: str, entries: Mapping[str, Mapping[str, Any]], read: Read) -> Bnb:
    said = json.loads(bytes(read(state, 0, entries[state]["shape"][0]).tolist()))
    shape, dtype, block = tuple(said["shape"]), getattr(torch, said["dtype"]), said["blocksize"]
    nested = (said["nested_blocksize"], said["nested_offset"]) if "nested_blocksize" in said else None
    parts = [name, state, *(f"{name}.{part}" for part in ("absmax", "quant_map"))]
    parts += [f"{name}.{part}" for part in ("nested_absmax", "nested_quant_map")] if nested else []
    begin, end = entries[name]["data_offsets"]
    numbers = {part: math.prod(entries[part]["shape"]) for part in parts[2:]}
    if (end - begin) != -(-math.prod(shape) // 2) or numbers[parts[2]] != -(-math.prod(shape) // block):
        raise ValueError(f"{list(shape)} in {end - begin} bytes with {numbers[parts[2]]} scales of {block} weights")
    return Bnb(name, tuple(parts), shape, dtype, (end - begin) // math.prod(entries[name]["shape"]), block, nested)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """That of the weights that are not quantised, in which transformers makes the others of them."""
    text = config.get("text_config") or {}
    named = next((part[key] for part in (config, text) for key in ("dtype", "torch_dtype") if part.get(key)), None)
    return {"float32": torch.float32, "float16": torch.float16}.get(str(named), torch.bfloat16)


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    groups = (settings.get("config_groups") or {}).values()
    given = settings.get("weight_block_size") or next(
        (size for group in groups if (size := (group.get("weights") or {}).get("block_structure"))), None
    )
    return None if given is None else (given[0], given[1])


def _nibbles(codes: Tensor, levels: Tensor, low_first: bool) -> Tensor:
    """``[..., 2 k]`` float32: what the two halves of each byte ``[..., k]`` stand for."""
    upper, lower = levels.repeat_interleave(16), levels.repeat(16)
    pairs = torch.stack([lower, upper] if low_first else [upper, lower], 1)  # of each byte
    found = pairs.view(torch.int64).flatten().index_select(0, codes.flatten().int())
    return found.view(torch.float32).view(*codes.shape[:-1], -1)


def _floats(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of two, biased by 127."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
