"""Access to the weights of a parameter that this rank holds, by position: plain, a shard, or a shard that is kept quantised.

Weights that were made exact are read and written to the bit; others of a quantised parameter can only be read.
"""

from __future__ import annotations

from torch import Tensor

from liftdist.distributed.sharding import local_tensor
from liftdist.engine import quantised


def numel(param: Tensor) -> int:
    """How many weights this rank holds."""
    held = quantised.held_by(param)
    return local_tensor(param).numel() if held is None else held.numel


def dense(param: Tensor) -> Tensor:
    """``[p]``, all of them; shares memory with the parameter, unless it is quantised."""
    held = quantised.held_by(param)
    return local_tensor(param).view(-1) if held is None else held.dense().view(-1)


def rows(param: Tensor, begin: int, end: int) -> Tensor:
    """``[end - begin, n]``: rows of the shard ``[..., n]`` seen as ``[all, n]``, of a vector its entries ``[end - begin, 1]``;
    shares memory with the parameter, unless it is quantised."""
    held = quantised.held_by(param)
    width = param.shape[-1] if param.ndim > 1 else 1
    return local_tensor(param).view(-1, width)[begin:end] if held is None else held.dense(begin, end)


def read(param: Tensor, positions: Tensor) -> Tensor:
    """``[k]``: the weights at ``positions [k]``."""
    held = quantised.held_by(param)
    return local_tensor(param).view(-1).index_select(0, positions) if held is None else held.read(positions)


def write(param: Tensor, positions: Tensor, weights: Tensor) -> None:
    """Set the weights at ``positions [k]``, on any device, to ``weights [k]``, rounded to the dtype of the parameter.

    Raises:
        RuntimeError: one is kept quantised.
    """
    held = quantised.held_by(param)
    if held is not None:
        held.write(positions, weights)
        return
    memory = local_tensor(param).view(-1)
    memory.index_copy_(0, positions.to(memory.device, non_blocking=True).long(), weights.to(memory))
