"""Whole parameters of a model, trained dense: of each, a rank steps the rows that it holds.

    parameter [..., n], sharded by its first dimension         value 4 B, gradient 4 B, and two moments 4 B each, a weight
    values[j]  its rows on this rank, the same memory          2 B each if the parameters are in bfloat16

FSDP2 gathers a parameter in the dtype that the model computes in, sums its gradient over the shards in float32 and leaves it in
the parameter's own dtype. What is not sharded, and the replicas of what is, are summed by :meth:`DenseWeights.reduce_gradients`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liftdist.distributed.collectives import Group
from liftdist.distributed.sharding import fsdp_modules, local_tensor, reshard
from liftdist.engine.clip import clip_grad_norm_
from liftdist.engine.matrices import default_replicate_group, shard_group


class DenseWeights:
    """Trains the parameters of ``model`` that require gradients, as tensors that any torch optimizer steps: :attr:`values`.

    Args:
        model: plain, or sharded by FSDP2: what is trained all plain, or all sharded by its first dimension over the same ranks.
        replicate_group: ranks that hold the same rows of other replicas, see :class:`liftdist.engine.principal.PrincipalWeights`.
    """

    def __init__(self, model: nn.Module, replicate_group: Group = None) -> None:
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._fsdp_modules = fsdp_modules(model)
        first = next(iter(self.params.values()))
        self.shard_group = shard_group(first)
        self.replicate_group = replicate_group or default_replicate_group(first)
        self.values = [nn.Parameter(local_tensor(param)) for param in self.params.values()]

    @property
    def _grads(self) -> list[Tensor]:
        return [value.grad for value in self.values if value.grad is not None]

    def reduce_gradients(self, divisor: Tensor | float) -> None:
        """Sum the gradients over the replicas and divide them by ``divisor``. Collective.

        That of a parameter which took no part in the backward is zero, as another replica's may not be.
        """
        for param, value in zip(self.params.values(), self.values, strict=True):
            value.grad = torch.zeros_like(value) if param.grad is None else local_tensor(param.grad)
            param.grad = None
        if self.replicate_group is not None:
            group = self.replicate_group
            works = [dist.all_reduce(grad, group=group, async_op=True) for grad in self._grads]
            for work in works:
                work.wait()
        for grad in self._grads:
            grad.div_(divisor)

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Scale the gradient so that its norm over all shards is at most ``max_norm``; return the norm before. Collective."""
        return clip_grad_norm_(self._grads, max_norm, self.shard_group)

    def written(self) -> None:
        """To be called when values have been changed: whole parameters that were gathered earlier, are stale."""
        reshard(self._fsdp_modules)

    def drop_gradients(self) -> None:
        """Clear the gradients, as if there had been no backward."""
        for param, value in zip(self.params.values(), self.values, strict=True):
            param.grad = value.grad = None
        for module in self._fsdp_modules:  # what a backward that failed has left to be reduced
            group = module._get_fsdp_state()._fsdp_param_group
            for fsdp_param in group.fsdp_params if group else ():
                if (whole := getattr(fsdp_param, "_unsharded_param", None)) is not None:
                    whole.grad = None

    def non_finite(self) -> list[str]:
        """Names of the parameters whose gradient on this rank is not finite."""
        pairs = zip(self.params, self.values, strict=True)
        return [name for name, value in pairs if value.grad is not None and not value.grad.isfinite().all()]
