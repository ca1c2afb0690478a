"""What a rank holds of a model that FSDP2 shards by rows, as :mod:`liftdist.distributed.rows` says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from liftdist.distributed.rows import row_bounds


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; no copy, no autograd."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which this rank may hold rows, without autograd. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The units of a model that FSDP2 shards; none of a plain one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: Iterable[FSDPModule]) -> None:
    """Free the whole parameters that FSDP2 has gathered: copies that are stale once weights are changed."""
    for module in modules:
        module.reshard()


def padding(shapes: Iterable[Sequence[int]], shards: int) -> float:
    """What is gathered of parameters of these shapes, in multiples of what they hold: each shard is padded to the largest."""
    pairs = [(row_bounds(shape[0], shards)[1] * shards / shape[0], math.prod(shape)) for shape in shapes if len(shape)]
    return sum(ratio * size for ratio, size in pairs) / sum(size for _, size in pairs)


def advice_on_padding(shapes: Iterable[Sequence[int]], replicas: int, shards: int) -> str | None:
    """What to say of parameters of these shapes that have too few rows for ``shards``, or None. Experts are a row each."""
    shapes = list(shapes)
    if (gathered := padding(shapes, shards)) <= 1.25:
        return None
    fewer = max(n for n in range(1, shards + 1) if shards % n == 0 and padding(shapes, n) <= 1.25)
    return (
        f"{shards} shards: parameters of fewer rows, such as experts, are padded: {gathered:.1f} times the weights are gathered; "
        f"mesh.dp_replicate={replicas * shards // fewer} has {fewer} shards"
    )


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The rows ``[begin, end)`` of a parameter that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 0
    axis = tensor.placements.index(Shard(0))
    bounds = row_bounds(tensor.shape[0], tensor.device_mesh.size(axis))
    shard = tensor.device_mesh.get_local_rank(axis)
    return bounds[shard], bounds[shard + 1]


def rows_local(tensor: Tensor) -> tuple[int, Tensor]:
    """This rank's rows of a tensor ``[..., n]`` seen as ``[all, n]``, of a vector its entries, and the number of the first."""
    local = local_tensor(tensor)
    if tensor.ndim < 2:
        return rows_of(tensor)[0], local.view(-1)
    return rows_of(tensor)[0] * tensor.shape[1:-1].numel(), local.view(-1, tensor.shape[-1])
