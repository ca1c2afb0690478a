"""A frozen parameter whose rows are kept, and gathered, in 8 or 4 bits, with exact weights over them.

A shard of ``m`` rows is one buffer of bytes, which is what FSDP gathers; each section begins at a multiple of 16:

    codes   [m, code_bytes]      scales  [m, blocks] bfloat16      see :mod:`liftdist.engine.quantisation`
    gaps    [w] uint8            the distance of each exact weight from the one before it, from the shard's first entry on
    values  [w]                  exact weights, in the dtype of the model

Distances above 255 are bridged by entries that repeat what the codes say there. All shards have as many entries, ``w``: the
fewer of a shard are filled up by its last one. When a layer has been gathered it is dequantised, and its exact weights are
written over it.

Beside the buffer, one bit for each entry says whether it was among the last to be made exact. Those are what is trained: a step
writes them in their order, without a search for their positions.

``m`` are the rows of the fullest shard, whichever this one is: FSDP gathers equal parts.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from liftdist.distributed.collectives import Group, together
from liftdist.distributed.sharding import rows_of
from liftdist.engine import bits
from liftdist.engine.quantisation import Format

ALIGNMENT = 16  # bytes
FARTHEST = 255  # distance of two entries


@dataclass(frozen=True)
class Sections:
    """Where the sections of a shard's buffer are."""

    format: Format
    rows: int
    entries: int
    dtype: torch.dtype  # of the weights

    @property
    def bounds(self) -> list[int]:
        """``[5]``: where each section begins, and the end."""
        sizes = (
            self.rows * self.format.code_bytes,
            self.rows * self.format.blocks * 2,
            self.entries,
            self.entries * self.dtype.itemsize,
        )
        return list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    def of(self, buffers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[s, m, code_bytes]``, ``[s, m, blocks]``, ``[s, w]`` and ``[s, w]``, views of buffers ``[s, bytes]`` of shards."""
        shards, (codes, scales, gaps, values, _) = buffers.shape[0], self.bounds
        rows, blocks, entries = self.rows, self.format.blocks, self.entries
        return (
            buffers[:, codes : codes + rows * self.format.code_bytes].view(shards, rows, -1),
            buffers[:, scales : scales + rows * blocks * 2].view(torch.bfloat16).view(shards, rows, blocks),
            buffers[:, gaps : gaps + entries],
            buffers[:, values : values + entries * self.dtype.itemsize].view(self.dtype),
        )


class QuantisedRows:
    """A shard of a parameter ``[..., n]`` seen as rows.

    Args:
        rows: of the fullest shard.
        here: rows of this one.

    Attributes:
        original: gives the weights of the base model at ascending positions ``[k]``, in the dtype of the model.
        of_fsdp: what FSDP keeps of the parameter.
    """

    def __init__(self, kind: str, columns: int, rows: int, here: int, dtype: torch.dtype, device: torch.device) -> None:
        self.format, self.rows, self.here, self.dtype = Format(kind, columns), rows, here, dtype
        self.original: Callable[[Tensor], Tensor] | None = None
        self.of_fsdp: weakref.ref[Any] | None = None
        self._number = 0  # of entries here; the buffer may have more
        self._bridges = torch.empty(0, dtype=torch.int64, device=device)  # which of them repeat what the codes say
        self._last: tuple[Tensor, Tensor] | None = (
            None  # positions made exact last, if they ascend; a bit for each entry
        )
        self._allocate(0, device)

    def _allocate(self, entries: int, device: torch.device) -> None:
        self.sections = Sections(self.format, self.rows, entries, self.dtype)
        self.buffer = torch.zeros(self.sections.bounds[-1], dtype=torch.uint8, device=device)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes, scales, gaps, values = self.sections.of(self.buffer.unsqueeze(0))
        return codes[0], scales[0], gaps[0], values[0]

    @property
    def numel(self) -> int:
        """Weights of this shard."""
        return self.here * self.format.columns

    def fill(self, first: int, rows: Tensor) -> None:
        """Quantise ``rows [k, n]`` of the base model, as the shard's rows from ``first`` on."""
        codes, scales, *_ = self._parts
        rows = rows.to(self.buffer.device, self.dtype)
        codes[first : first + len(rows)], scales[first : first + len(rows)] = self.format.quantise(rows)

    def __len__(self) -> int:
        return self.here

    def __getitem__(self, row: int) -> Tensor:
        """``[n]``: a row as the model computes with it."""
        return self.dense(row, row + 1)[0]

    def dense(self, begin: int = 0, end: int | None = None) -> Tensor:
        """``[end - begin, n]``: rows as the model computes with them; a copy."""
        end = self.here if end is None else end
        codes, scales, _, values = self._parts
        out = torch.empty(end - begin, self.format.columns, dtype=self.dtype, device=self.buffer.device)
        self.format.dequantise(codes[begin:end], scales[begin:end], out)
        positions = self._positions()
        first, last = torch.searchsorted(
            positions, positions.new_tensor([begin, end]) * self.format.columns, out_int32=True
        ).tolist()
        out.view(-1).index_copy_(0, positions[first:last].long() - begin * self.format.columns, values[first:last])
        return out

    def packed(self, begin: int, end: int) -> Tensor:
        """``[bytes]`` uint8: rows as they are kept, for :func:`unpack`."""
        codes, scales, gaps, values = self._parts
        positions, edges = self._positions(), (begin * self.format.columns, end * self.format.columns)
        first, last = torch.searchsorted(positions, positions.new_tensor(edges), out_int32=True).tolist()
        gaps = gaps[first:last].clone()
        gaps[:1] = positions[first : first + 1][: last - first] - edges[0]  # at most the distance to the entry before
        parts = codes[begin:end], scales[begin:end], values[first:last]
        codes, scales, values = (part.contiguous().view(-1).view(torch.uint8) for part in parts)
        return torch.cat([codes, scales, gaps, values])

    def _positions(self) -> Tensor:
        """``[k]`` int32 ascending, of the entries."""
        return self._parts[2][: self._number].cumsum(0, dtype=torch.int32)

    def read(self, positions: Tensor) -> Tensor:
        """``[k]``: the weights at ``positions [k]``, as the model computes with them."""
        codes, scales, _, values = self._parts
        found = self.format.dequantise_at(codes, scales, positions.long(), self.dtype)
        if not self._number:
            return found
        place, is_exact = self._places(positions)
        return torch.where(is_exact, values[place], found)

    def write(self, positions: Tensor, weights: Tensor) -> None:
        """Set the weights at ``positions [k]``, which are exact, to ``weights [k]``, rounded. Fast for the very tensor that
        :meth:`add` was given last, on whichever device it is: its entries are not read.

        Raises:
            RuntimeError: one of them is not exact.
        """
        if not positions.numel():
            return
        values = self._parts[3]
        if self._last is not None and positions is self._last[0]:
            values[: self._number].masked_scatter_(bits.unpack(self._last[1], self._number), weights.to(values))
        else:
            place, is_exact = self._places(positions.to(values.device))
            if not is_exact.all():  # a GPU that asserted it would be of no use after
                raise RuntimeError("a weight that is kept quantised cannot be written: make it exact first")
            values[place] = weights.to(values)
        values[self._number :] = values[self._number - 1]

    def _places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``[k]`` int64 and bool: the entries at ``positions``, and whether there are such."""
        known = self._positions()
        if not self._number:
            return torch.zeros_like(positions, dtype=torch.int64), torch.zeros_like(positions, dtype=torch.bool)
        place = torch.searchsorted(known, positions.to(known)).clamp_max(self._number - 1)
        return place, known[place] == positions

    def add(self, positions: Tensor) -> int:
        """Let the weights at ``positions [k]``, on any device, be exact, beside those that are: those of the base model at first.

        Returns:
            How many entries that takes here; :meth:`lay_out` makes it so.

        Raises:
            ValueError: the weights of the base model are not known.
        """
        known, values = self._positions(), self._parts[3][: self._number]
        here = positions.to(known.device)
        is_bridge = _marked(known, self._bridges)
        kept, weights = known[~is_bridge], values[~is_bridge]
        new = here[~torch.isin(here, kept)].to(known).sort().values
        if new.numel():
            if self.original is None:
                raise ValueError("the weights of the base model are not known")
            kept, order = torch.cat([kept, new]).sort()
            weights = torch.cat([weights, self.original(new).to(weights)])[order]
        gaps, bridges = _gaps(kept)
        repeated = gaps.cumsum(0, dtype=torch.int32)[bridges]
        values = weights.new_empty(gaps.numel())
        values[bridges] = self.format.dequantise_at(*self._parts[:2], repeated.long(), self.dtype)
        is_exact = ~_marked(values, bridges)
        values[is_exact] = weights
        self._added, self._last = (gaps, bridges, values), None
        if (here.diff() > 0).all():
            self._last = positions, bits.pack(is_exact.masked_scatter(is_exact, torch.isin(kept, here)))
        return gaps.numel() if kept.numel() else 0

    def lay_out(self, entries: int) -> None:
        """Make room for ``entries`` entries, at least as many as :meth:`add` returned here; 0 if it was 0 in all shards."""
        (gaps, bridges, values), (codes, scales, *_) = self._added, self._parts
        del self._added
        self._allocate(entries, self.buffer.device)
        parts = self._parts
        parts[0].copy_(codes)
        parts[1].copy_(scales)
        self._number, self._bridges = (gaps.numel(), bridges) if entries else (0, bridges[:0])
        if self.of_fsdp is not None and (fsdp_param := self.of_fsdp()) is not None:
            fsdp_param.all_gather_outputs = []  # which FSDP keeps, of the former size
        if entries:
            parts[2][: self._number], parts[3][: self._number] = gaps, values
            parts[3][self._number :] = values[-1]


def unpack(packed: Tensor, format: Format, out: Tensor) -> Tensor:
    """Write rows that :meth:`QuantisedRows.packed` made to ``out [m, n]``, contiguous, in the dtype in which they are exact."""
    sizes = out.shape[0] * format.code_bytes, out.shape[0] * format.blocks * 2
    codes, scales, exact = packed.split([*sizes, packed.numel() - sum(sizes)])
    gaps, values = exact.split([(entries := exact.numel() // (1 + out.element_size())), exact.numel() - entries])
    scales, values = scales.clone().view(torch.bfloat16), values.clone().view(out.dtype)  # aligned
    format.dequantise(codes.view(-1, format.code_bytes), scales.view(-1, format.blocks), out)
    out.view(-1).index_copy_(0, gaps.cumsum(0), values)
    return out


def _marked(like: Tensor, where: Tensor) -> Tensor:
    """``[k]`` bool, of as many elements as ``like`` has: those at the indices ``where``."""
    flags = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    flags[where] = True
    return flags


def _gaps(positions: Tensor) -> tuple[Tensor, Tensor]:
    """``[w]`` uint8, the distances of ascending ``positions [k]`` from one to the next, and which of them, int64, end at none."""
    if not positions.numel():  # the first entry, to fill up with
        return positions.new_zeros(1, dtype=torch.uint8), positions.new_zeros(1, dtype=torch.int64)
    distances = positions.diff(prepend=positions.new_zeros(1)).long()
    bridges = ((distances - 1) // FARTHEST).clamp_min_(0)
    ends = (bridges + 1).cumsum(0) - 1
    gaps = torch.full((int(ends[-1]) + 1,), FARTHEST, dtype=torch.uint8, device=positions.device)
    gaps[ends] = (distances - bridges * FARTHEST).to(torch.uint8)
    return gaps, (~_marked(gaps, ends)).nonzero().squeeze(1)


class QuantisedTensor(Tensor):
    """What a sharded parameter holds locally. FSDP gathers its bytes; nothing else can be done with it than to read its rows."""

    held: QuantisedRows

    @staticmethod
    def __new__(cls, held: QuantisedRows, shape: Sequence[int]) -> QuantisedTensor:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=held.dtype, device=held.buffer.device)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantisedTensor({list(self.shape)}, {self.held.format.name})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _VIEWS:
            return cls(args[0].held, args[0].shape)
        raise NotImplementedError(f"{func} of a quantised parameter: read its rows")

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor], Sections]:  # noqa: ARG002
        return (self.held.buffer,), self.held.sections

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor], sections: Sections, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The parameter, ``[s m, n]``, of which FSDP takes what it has; written to ``out`` from the second time on."""
        format, rows = sections.format, sections.rows
        buffers = outputs[0].view(-1, sections.bounds[-1])
        shape = len(buffers) * rows, format.columns
        whole = (
            torch.empty(shape, dtype=param_dtype, device=buffers.device)
            if out is None
            else out.detach().as_strided(shape, (format.columns, 1))
        )
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(whole if out is None else out):
            codes, scales, gaps, values = sections.of(buffers)
            format.dequantise(codes.reshape(shape[0], -1), scales.reshape(shape[0], -1), whole)
            if sections.entries:
                firsts = torch.arange(len(buffers), device=gaps.device).mul_(rows * format.columns).unsqueeze(1)
                positions = gaps.cumsum(1) + firsts
                whole.view(-1).index_copy_(0, positions.view(-1), values.reshape(-1).to(whole.dtype))
        outputs[0].untyped_storage().resize_(0)  # FSDP would keep it as long as the parameter
        return (whole, (whole,)) if out is None else None


_VIEWS = {
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.empty_like.default,  # it is where it shall be
}


def held_by(param: Tensor) -> QuantisedRows | None:
    """What a parameter that is kept quantised holds; None of any other."""
    local = param._local_tensor if isinstance(param, DTensor) else param
    return local.held if isinstance(local, QuantisedTensor) else None


def make_exact(params: Sequence[Tensor], positions: Sequence[Tensor], group: Group) -> None:
    """Let the weights of those parameters that are quantised be exact at ``positions``, ``[k]`` in the shard of each, on any
    device.

    Collective over the group of the shards.
    """
    held_and_where = zip(map(held_by, params), positions, strict=True)
    pairs = [(held, where) for held, where in held_and_where if held is not None]
    if not pairs:
        return
    with together():  # the base model is read
        entries = torch.tensor([held.add(where) for held, where in pairs], device=pairs[0][0].buffer.device)
    if group is not None:
        dist.all_reduce(entries, op=dist.ReduceOp.MAX, group=group)
    for (held, _), number in zip(pairs, entries.tolist(), strict=True):
        held.lay_out(number)


def quantise(modules: Sequence[FSDPModule], params: Collection[Tensor], kind: str, device: torch.device) -> None:
    """Keep ``params``, which FSDP has sharded on the meta device, in a format on ``device``. Their rows are zero until filled."""
    chosen = {id(param) for param in params}
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        for fsdp_param in group.fsdp_params if group is not None else ():
            param: Any = fsdp_param.sharded_param
            if id(param) not in chosen:
                continue
            inner, columns = param.shape[1:-1].numel(), param.shape[-1]
            fullest = fsdp_param.padded_sharded_param_size
            begin, end = rows_of(param)
            held = QuantisedRows(kind, columns, fullest[0] * inner, (end - begin) * inner, param.dtype, device)
            held.of_fsdp = weakref.ref(fsdp_param)
            local = QuantisedTensor(held, fullest)  # all shards alike: FSDP pads no bytes
            sharded = DTensor.from_local(
                local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
            )
            made, info = nn.Parameter(sharded, requires_grad=param.requires_grad), fsdp_param._module_info
            owners = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
            for owner, name in zip(*owners, strict=True):
                setattr(owner, name, made)
            fsdp_param.reset_sharded_param()
            fsdp_param._init_extensions()
