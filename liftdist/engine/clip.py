"""The global norm of gradients whose parts lie on several ranks, and its bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liftdist.distributed.collectives import Group, all_reduce_sum


@torch.no_grad()
def clip_grad_norm_(
    grads: Sequence[Tensor], max_norm: float | None, group: Group, device: torch.device | None = None
) -> Tensor:
    """Scale gradients so that their norm over all ranks of ``group`` is at most ``max_norm``; return the norm before.

    If the norm is not finite, they are left unchanged for the caller to handle. Collective.

    Args:
        device: of the ranks, on which the norm is; by default that of the gradients.
    """
    squared = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads]).sum()
    norm = all_reduce_sum(squared.to(device or squared.device), group).sqrt().float()
    if max_norm is not None:
        scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.device))
    return norm
