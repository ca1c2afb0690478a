"""How FSDP2 reduces the gradients of trained matrices: exchanged sparsely, and taken before they are rounded.

A unit, one FSDP module, reduces the gradients of its parameters together. Its ranks hold them whole, as one buffer with a
row for each shard; row s has, parameter after parameter, the padded rows that shard s owns:

    dense    [shards, row] --reduce-scatter--> [row]          4 B a weight, float32

Of that only principal entries are wanted. Every shard tells the others where its own are, and only those are reduced:

    where    [width] int32  --all-gather-->     [shards, width]    positions in each shard's row; width: the most of any shard
    what     [shards, width] --reduce-scatter--> [width]           and back to its place in [row], 0 elsewhere

At density d this is 8 d B a weight instead of 4, and nothing is kept from one backward to the next. The whole gradients stay in
the dtype that backward gave them: float32 are the principal entries, before they are summed.

With parameters in bf16 FSDP reduces in float32, casts the reduced buffer to bf16, and gives each parameter a view of the cast
one as its gradient, at the offset that the parameter has in the row. An all-reduce hook sees the buffer first, and the
parameter's own hook finds its part of it by that offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor, Shard

from liftdist.distributed.collectives import all_gather_single, reduce_scatter_single
from liftdist.distributed.sharding import row_bounds


class FSDPReduction:
    """One FSDP module: its gradients come out of one reduction, as views of one buffer. Is its ``ReduceScatter``, too."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        shards: int,
        gradient_dtype: torch.dtype,
        others: Callable[[Tensor], None] | None,
    ) -> None:
        self._shards = shards
        self._gradient_dtype = gradient_dtype  # as backward leaves them
        self._others = others  # a hook that was there before
        self.reduced: Tensor | None = None  # [row] in the reduction's dtype
        self._waiting = 0  # parameters whose part was not taken yet
        self._offsets: dict[int, int] = {}  # where each trained parameter begins in a row, by id
        self._row = 0  # elements of a row
        for param in params:
            self._offsets[id(param)] = self._row
            self._row += row_bounds(param.shape[0], shards)[1] * (param.numel() // param.shape[0])
        self._indices: dict[int, Tensor] = {}  # of each parameter, into this rank's rows
        self._width: int | None = None

    def choose(self, param: nn.Parameter, indices: Tensor) -> None:
        """From now on ``indices``, ``[k_local]`` int32, are the principal weights of this rank's rows of ``param``."""
        self._indices[id(param)] = indices
        self._width = None

    def keep(self, reduced: Tensor) -> None:
        """All-reduce hook: keep the buffer until every parameter has taken its part."""
        if self._others is not None:
            self._others(reduced)
        # FSDP casts the buffer right after this hook, then fires the parameters' own hooks
        if reduced.is_cuda:
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self.reduced, self._waiting = reduced, len(self._offsets)

    def unrounded(self, gradient: Tensor) -> Tensor:
        """``gradient`` before it was rounded, ``[numel]``; or itself, where the reduction did not round it."""
        if self.reduced is None:
            return gradient
        part = self.reduced.narrow(0, gradient.storage_offset(), gradient.numel())
        self._waiting -= 1
        if self._waiting == 0:
            self.reduced = None
        return part

    def drop(self) -> None:
        """Forget a buffer of which some parameter has not taken its part."""
        self.reduced = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of ``ReduceScatter``: for the gradients ``[shards * row]``, and for the result ``[row]``."""
        if tuple(size) == (self._shards * self._row,):
            dtype = self._gradient_dtype
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any) -> None:
        """Of ``ReduceScatter``: principal entries of ``input_tensor [shards * row]``, to ``output_tensor [row]``, 0 elsewhere."""
        shards, row, size = group.size(), output_tensor.numel(), output_tensor.element_size()
        width = self._widest(group, output_tensor.device)
        # a parameter took no part in the backward, on all ranks alike; or there is nothing to gain
        if row != self._row or row >= 2**31 or width * (4 + size) >= row * size:
            reduce_scatter_single(output_tensor, input_tensor.to(output_tensor.dtype), op=op, group=group)
            return
        output_tensor.zero_()
        if width == 0:
            return
        mine = torch.cat([self._indices[key] + offset for key, offset in self._offsets.items()])
        where = mine.new_empty(shards * width)
        all_gather_single(where, nn.functional.pad(mine, (0, width - mine.numel())), group=group)
        rows = torch.arange(shards, device=where.device).mul_(row).repeat_interleave(width)
        what = input_tensor.index_select(0, rows.add_(where)).to(output_tensor.dtype)
        received = what.new_empty(width)
        reduce_scatter_single(received, what, op=op, group=group)
        output_tensor.index_copy_(0, mine.long(), received[: mine.numel()])

    def _widest(self, group: Any, device: torch.device) -> int:
        """The most principal weights that any shard has of this unit: asked once for each set of indices. Collective."""
        if self._width is None:
            width = torch.tensor(sum(indices.numel() for indices in self._indices.values()), device=device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
            self._width = int(width)
        return self._width


def watch(
    modules: Sequence[FSDPModule], params: Sequence[nn.Parameter], sparse: bool = True
) -> dict[int, FSDPReduction]:
    """Take over the reductions of FSDP modules that hold trained ``params``; the unit of each of them, by ``id``.

    Args:
        sparse: exchange principal entries instead of whole gradients. :meth:`Unit.choose` must be told of them before the
            first backward.
    """
    trained = {id(param) for param in params if isinstance(param, DTensor)}
    of_param: dict[int, FSDPReduction] = {}
    for module in modules:
        # modules that were given to one fully_shard() together have one
        group = module._get_fsdp_state()._fsdp_param_group
        infos = [fsdp_param._module_info for fsdp_param in group.fsdp_params] if group else []
        owned = [getattr(info.module, info.param_name) for info in infos]  # as the reduction lays them out
        owned = [param for param in owned if id(param) in trained]
        if group is None or not owned or id(owned[0]) in of_param:
            continue
        shards = owned[0].device_mesh.size(owned[0].placements.index(Shard(0)))
        others = group._all_reduce_hook
        if isinstance(
            former := getattr(others, "__self__", None), FSDPReduction
        ):  # of principal weights that were dropped
            others = former._others
        unit = FSDPReduction(owned, shards, group.mp_policy.param_dtype or owned[0].dtype, others)
        if any(param.dtype != torch.float32 for param in owned):
            module.set_all_reduce_hook(unit.keep)
        if shards > 1 and type(group._reduce_scatter_comm) in (
            DefaultReduceScatter,
            FSDPReduction,
        ):  # not somebody's own
            module.set_custom_reduce_scatter(unit if sparse else DefaultReduceScatter())  # type: ignore[arg-type]
        of_param.update(dict.fromkeys(map(id, owned), unit))
    return of_param
