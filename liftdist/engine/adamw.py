"""AdamW on the principal weights that writes them into the model in the same pass over memory.

An entry has an index (4 B), a gradient, a value and two moments (16 B). One kernel reads them once, and writes value, moments, a
cleared gradient and the weight in the model. torch's own AdamW and :meth:`PrincipalWeights.write_back`, one after the other, do
the same in several passes, and do it wherever the kernel does not run.
"""

from __future__ import annotations

import subprocess
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.engine.principal import PrincipalWeights

BLOCK = 1024  # entries that one program of the kernel steps


class PrincipalAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on ``principal.values`` whose ``step()`` does ``principal.write_back()``, too.

    Its state is that of ``torch.optim.AdamW``. On GPUs that Triton compiles for, all is one kernel; ``in_one_kernel`` says so,
    and False takes torch's own way. Collective: ranks that hold the same weights must not differ in it.
    """

    def __init__(
        self,
        principal: PrincipalWeights,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__([principal.values], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._step_supports_amp_scaling = False  # a GradScaler shall unscale, and leave out steps, itself
        self.principal = principal
        self.in_one_kernel = principal.values.is_cuda and self._compiles_everywhere()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the values and write them into the model, rounded; clear the gradient. Returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values, gradient = self.principal.values, self.principal.values.grad
        unusual = len(self.param_groups) > 1 or any(self.param_groups[0][key] for key in ("amsgrad", "maximize"))
        if self.in_one_kernel and not unusual and gradient is not None and self.state[values] and values.numel():
            self._step_in_one_kernel(gradient)
            self.principal.written_back()
        else:  # the first step makes the state
            super().step()
            self.principal.write_back()
        return loss

    def _step_in_one_kernel(self, gradient: Tensor) -> None:
        group, state = self.param_groups[0], self.state[self.principal.values]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].to(gradient.device, torch.float64)
        scales = torch.stack([group["lr"] / (1 - beta1**step), (1 - beta2**step).rsqrt()])
        begin, segments = 0, []
        for matrix, indices in zip(self.principal.matrices, self.principal.indices, strict=True):
            segments.append([begin, indices.numel(), indices.data_ptr(), matrix.address])
            begin += indices.numel()
        values = self.principal.values.detach()
        self._launch(segments, scales.float(), values, gradient, state["exp_avg"], state["exp_avg_sq"])

    def _launch(self, segments: list[list[int]], scales: Tensor, *entries: Tensor) -> None:
        import triton
        import triton.language as tl

        from liftdist.engine import kernels

        group = self.param_groups[0]
        weight = self.principal.matrices[0].dtype
        grid = (triton.cdiv(max(1, *(segment[1] for segment in segments)), BLOCK), len(segments))
        with torch.cuda.device_of(scales):
            kernels.adamw_and_write_back[grid](
                torch.tensor(segments, device=scales.device),
                scales,
                *entries,
                *group["betas"],
                group["eps"],
                float(group["lr"] * group["weight_decay"]),
                WEIGHT=getattr(tl, str(weight).removeprefix("torch.")),
                BLOCK=BLOCK,
            )

    def _compiles_everywhere(self) -> bool:
        compiles = torch.tensor(int(self._compiles()), device=self.principal.values.device)
        if dist.is_initialized():
            dist.all_reduce(compiles, op=dist.ReduceOp.MIN)
        return bool(compiles)

    def _compiles(self) -> bool:
        """Whether the kernel runs here: Triton may be absent, or lack a compiler or a driver. Raises any other error: a bug."""
        if len({matrix.dtype for matrix in self.principal.matrices}) > 1:
            return False  # the kernel writes weights of one dtype
        nothing = torch.zeros(2, device=self.principal.values.device)
        try:
            self._launch([[0, 0, 0, 0]], nothing, nothing, nothing, nothing, nothing)
        except Exception as error:
            if not _is_missing_toolchain(error):
                raise
            warnings.warn(
                f"AdamW and the writing of weights run one after the other, no Triton kernel here ({error})",
                stacklevel=3,
            )
            return False
        return True


def _is_missing_toolchain(error: Exception) -> bool:
    """Whether Triton cannot work on this machine: it is absent, or its own code found no compiler or driver that will do."""
    if isinstance(error, ImportError):
        return True
    own = isinstance(error, RuntimeError | OSError | subprocess.SubprocessError)
    innermost = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1:]
    return (
        own
        and not isinstance(error, torch.AcceleratorError)
        and any("triton" in Path(name).parts for name in innermost)
    )
