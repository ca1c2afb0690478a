"""The reduced gradients of FSDP2 as they are before they are rounded.

With parameters in bf16 FSDP reduces gradients in float32, casts the reduced buffer to bf16, and gives each parameter a view of
the cast one as its gradient: at the offset that the parameter has in the buffer. An all-reduce hook sees the buffer first, and
the parameter's own hook finds its part of it by that offset. No other knowledge of the buffer's layout is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Unit:
    """One FSDP module: its gradients come out of one reduction, as views of one buffer."""

    def __init__(self, others: Callable[[Tensor], None] | None) -> None:
        self._others = others  # a hook that was there before
        self.reduced: Tensor | None = None  # [padded rows of all its trained parameters] in the reduction's dtype
        self._waiting = 0  # parameters whose part was not taken yet
        self.params = 0  # trained ones of the module

    def keep(self, reduced: Tensor) -> None:
        """All-reduce hook: keep the buffer until every parameter has taken its part."""
        if self._others is not None:
            self._others(reduced)
        # FSDP casts the buffer right after this hook, then fires the parameters' own hooks
        if reduced.is_cuda:
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self.reduced, self._waiting = reduced, self.params

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


def watch(modules: Sequence[FSDPModule], params: Sequence[nn.Parameter]) -> dict[int, Unit]:
    """Keep each FSDP module's reduced gradients before they are rounded; the unit of each parameter, by ``id``."""
    trained = {id(param): param for param in params if isinstance(param, DTensor)}
    of_param: dict[int, Unit] = {}
    of_state: dict[int, Unit] = {}  # modules that were given to one fully_shard() together are reduced together
    for module in reversed(modules):  # inner modules come later and own their parameters
        assert isinstance(module, nn.Module)
        owned = [id(p) for p in module.parameters() if id(p) in trained and id(p) not in of_param]
        if not owned:
            continue
        state = module._get_fsdp_state()
        if id(state) not in of_state:
            of_state[id(state)] = unit = Unit(getattr(state._fsdp_param_group, "_all_reduce_hook", None))
            if any(trained[key].dtype != torch.float32 for key in owned):
                module.set_all_reduce_hook(unit.keep)
        of_param.update(dict.fromkeys(owned, of_state[id(state)]))
        of_state[id(state)].params += len(owned)
    return of_param
