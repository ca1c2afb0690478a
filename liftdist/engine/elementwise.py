"""What the optimizers share that step principal weights by their own arithmetic: one rounding, and where weight decay pulls.

x = x - lr d (x - x_0) - lr update        in float32, then rounded to the dtype of the values, once

x_0 is 0, or the value of the entry in the base model (decoupled decay, arXiv 1711.05101; L2-SP, arXiv 1802.01483, decoupled).
Decay apart from the update would be lost in bf16 values wherever it is less than half of the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from liftdist.engine.principal import PrincipalWeights

CHUNK = 2**24  # entries at a time, as intermediate results are whole tensors


def in_float32(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """A chunk of each of the vectors at a time, in float32; what the caller does to it in place is rounded into the vector."""
    for parts in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
        wide = [part.float() for part in parts]  # the part itself if it is float32
        yield wide
        for part, computed in zip(parts, wide, strict=True):
            if part is not computed:
                part.copy_(computed)


def decay_target(principal: PrincipalWeights, to_base: bool) -> Tensor:
    """``x_0 [k_local]``: zeros that take no memory, or a copy of the base values; raises ``ValueError`` if they are not kept."""
    if to_base:
        return principal.base_values
    return torch.zeros((), device=principal.values.device).expand_as(principal.values)
