"""How FSDP2 reduces the gradients of trained matrices: exchanged sparsely, and read before they are rounded.

A unit, one FSDP module, reduces the gradients of its parameters together. Each rank holds them unsharded, in one buffer with a
row for each shard; row s concatenates, over the parameters that require gradients now, the padded rows that shard s owns:

    dense    [shards, row] --reduce-scatter--> [row]          4 B per weight, float32

Only the principal entries are needed. Each shard sends the others the positions of its own, and only those are reduced:

    where    [width] int32  --all-gather-->     [shards, width]    positions in each shard's row; width: the most of any shard
    what     [shards, width] --reduce-scatter--> [width]           written to their positions in [row], 0 elsewhere

At density d this is 8 d B per weight instead of 4, and nothing is kept from one backward to the next. Unsharded gradients
stay in the dtype that backward produced; only principal entries are cast to float32, before they are summed.

With parameters in bf16 FSDP reduces in float32, casts the reduced buffer to bf16, and gives each parameter a view of the cast
one as its gradient, at the offset that the parameter has in the row. An all-reduce hook receives the float32 buffer
before the cast, and the parameter's own hook finds its part of it by that offset.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor, Shard

from liftdist.distributed.collectives import all_gather_single, reduce_scatter_single
from liftdist.distributed.rows import row_bounds
from liftdist.distributed.sharding import reshard


class FSDPReduction:
    """The reduction of one FSDP module, whose gradients are views of one buffer. Also the module's ``ReduceScatter``."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        shards: int,
        gradient_dtype: torch.dtype,
        previous_hook: Callable[[Tensor], None] | None,
    ) -> None:
        self._params = params  # the trained ones, in the order of the buffer
        self._shards = shards
        self._gradient_dtype = gradient_dtype  # as backward produces them
        self._previous_hook = previous_hook  # an all-reduce hook that was installed before
        self.reduced: Tensor | None = None  # [row] in the reduction's dtype
        self._waiting = 0  # parameters that have not read their part yet
        self._indices: dict[int, Tensor] = {}  # by id of the parameter, into this rank's rows
        self._width: int | None = None
        self._is_dense = False

    @property
    def _sizes(self) -> dict[int, int]:
        """Elements in a row of each parameter that requires a gradient now, by id."""
        needed = [param for param in self._params if param.requires_grad]
        return {id(p): row_bounds(p.shape[0], self._shards)[1] * (p.numel() // p.shape[0]) for p in needed}

    @property
    def _row(self) -> int:
        """Elements of a row."""
        return sum(self._sizes.values())

    def choose(self, param: nn.Parameter, indices: Tensor) -> None:
        """Set the principal weights of this rank's rows of ``param`` to ``indices``, ``[k_local]`` int32, on any device."""
        self._indices[id(param)] = indices
        self._width = None

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """A context in which whole gradients are reduced."""
        self._is_dense = True
        try:
            yield
        finally:
            self._is_dense = False

    def keep(self, reduced: Tensor) -> None:
        """All-reduce hook: keep the buffer until every parameter has read its part."""
        if self._previous_hook is not None:
            self._previous_hook(reduced)
        # FSDP casts the buffer right after this hook, then fires the parameters' own hooks
        if reduced.is_cuda:
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self.reduced, self._waiting = reduced, len(self._sizes)

    def unrounded(self, gradient: Tensor) -> Tensor:
        """``gradient`` before rounding, ``[numel]``, or ``gradient`` itself if the reduction did not round it."""
        if self.reduced is None:
            return gradient
        part = self.reduced.narrow(0, gradient.storage_offset(), gradient.numel())
        self._waiting -= 1
        if self._waiting == 0:
            self.reduced = None
        return part

    def drop(self) -> None:
        """Release a buffer that some parameter has not read."""
        self.reduced = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``ReduceScatter.allocate``: a buffer for the gradients ``[shards * row]``, or for the result ``[row]``."""
        if tuple(size) == (self._shards * self._row,):
            dtype = self._gradient_dtype
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **_: Any) -> None:
        """``ReduceScatter``: principal entries of ``input_tensor [shards * row]`` to ``output_tensor [row]``, 0 elsewhere."""
        shards, row, size = group.size(), output_tensor.numel(), output_tensor.element_size()
        width = row if self._is_dense else self._widest(group, output_tensor.device)
        # dense if a parameter took no part in the backward (the same on all ranks), or if sparse saves nothing
        if row != self._row or row >= 2**31 or width * (4 + size) >= row * size:
            reduce_scatter_single(output_tensor, input_tensor.to(output_tensor.dtype), op=op, group=group)
            return
        output_tensor.zero_()
        if width == 0:
            return
        sizes = self._sizes
        offsets = itertools.accumulate(sizes.values(), initial=0)
        here = [self._indices[key].to(output_tensor.device, non_blocking=True) for key in sizes]
        mine = torch.cat([indices + offset for indices, offset in zip(here, offsets, strict=False)])
        where = mine.new_empty(shards * width)
        all_gather_single(where, nn.functional.pad(mine, (0, width - mine.numel())), group=group)
        rows = torch.arange(shards, device=where.device).mul_(row).repeat_interleave(width)
        what = input_tensor.index_select(0, rows.add_(where)).to(output_tensor.dtype)
        received = what.new_empty(width)
        reduce_scatter_single(received, what, op=op, group=group)
        output_tensor.index_copy_(0, mine.long(), received[: mine.numel()])

    def _widest(self, group: Any, device: torch.device) -> int:
        """The largest number of principal weights of this unit on a shard, reduced once per selection. Collective."""
        if self._width is None:
            width = torch.tensor(sum(indices.numel() for indices in self._indices.values()), device=device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
            self._width = int(width)
        return self._width


def watch(
    modules: Sequence[FSDPModule], params: Sequence[nn.Parameter], sparse: bool = True
) -> dict[int, FSDPReduction]:
    """Install reductions on the FSDP modules that hold trained ``params``; return that of each parameter, by its ``id``.

    Args:
        sparse: exchange principal entries instead of whole gradients. Call :meth:`FSDPReduction.choose` for each parameter
            before the first backward.
    """
    trained = {id(param) for param in params if isinstance(param, DTensor)}
    of_param: dict[int, FSDPReduction] = {}
    for module in modules:
        # modules that were passed to one fully_shard() call share a group
        group = module._get_fsdp_state()._fsdp_param_group
        infos = [fsdp_param._module_info for fsdp_param in group.fsdp_params] if group else []
        owned = [getattr(info.module, info.param_name) for info in infos]  # in the order of the reduction's buffer
        owned = [param for param in owned if id(param) in trained]
        if group is None or not owned or id(owned[0]) in of_param:
            continue
        shards = owned[0].device_mesh.size(owned[0].placements.index(Shard(0)))
        previous_hook = group._all_reduce_hook
        # replace the hook of principal weights that were deleted
        if isinstance(former := getattr(previous_hook, "__self__", None), FSDPReduction):
            previous_hook = former._previous_hook
        reduction = FSDPReduction(owned, shards, group.mp_policy.param_dtype or owned[0].dtype, previous_hook)
        if any(param.dtype != torch.float32 for param in owned):
            module.set_all_reduce_hook(reduction.keep)
        # keep a reduce-scatter that the user installed
        if shards > 1 and type(group._reduce_scatter_comm) in (DefaultReduceScatter, FSDPReduction):
            module.set_custom_reduce_scatter(reduction if sparse else DefaultReduceScatter())  # type: ignore[arg-type]
        of_param.update(dict.fromkeys(map(id, owned), reduction))
    return of_param


def renew(modules: Sequence[FSDPModule]) -> None:
    """To be called when other parameters require gradients than before.

    FSDP copies the flag when it gathers a parameter, and takes the dtype in which a unit is reduced from the parameters that
    required gradients in its first forward: it would reduce in bf16 where none did.
    """
    reshard(modules)
    for module in modules:
        if (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            group._init_mp_dtypes()
