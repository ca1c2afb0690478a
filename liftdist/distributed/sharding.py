"""How rows are sharded over ranks: like ``torch.chunk``, so that the last ranks may hold fewer rows, or none."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself; no copy, no autograd."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def row_bounds(rows: int, shards: int) -> tuple[int, ...]:
    """``[shards + 1]``: shard ``s`` holds rows ``bounds[s]`` to ``bounds[s + 1]``, as ``torch.chunk`` splits them."""
    chunk = -(-rows // shards)
    return tuple(min(rows, chunk * shard) for shard in range(shards + 1))


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
