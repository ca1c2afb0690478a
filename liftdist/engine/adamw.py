"""AdamW on the principal weights, fused with the write-back into the model.

An entry has an index (4 B), a gradient, a value and two moments (16 B). One kernel reads them once, and writes value, moments, a
cleared gradient and the weight in the model. Where the kernel does not run, torch's AdamW followed by
:meth:`PrincipalWeights.write_back` does the same in several passes over memory.

Values in bf16 are stepped by torch's AdamW alone: their gradient is rounded to bf16, once, and value and moments are read,
computed in float32, and rounded, as for any bf16 parameter.
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

BLOCK = 1024  # entries per program of the kernel


class PrincipalAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on ``principal.values`` whose ``step()`` includes ``principal.write_back()``.

    The optimizer state is that of ``torch.optim.AdamW``. ``in_one_kernel`` is True where Triton compiles the kernel on every
    rank; set it to False to use torch's implementation, on all ranks that hold the same weights. The constructor is collective.
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
        self._step_supports_amp_scaling = False  # GradScaler must unscale gradients and skip steps itself
        self.principal = principal
        in_float32 = principal.dtype == torch.float32
        self.in_one_kernel = in_float32 and principal.values.is_cuda and self._compiles_everywhere()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the values, write them into the model, rounded, and clear the gradient. Returns the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values, gradient = self.principal.values, self.principal.values.grad
        unsupported = len(self.param_groups) > 1 or any(self.param_groups[0][key] for key in ("amsgrad", "maximize"))
        if self.in_one_kernel and not unsupported and gradient is not None and self.state[values] and values.numel():
            self._step_in_one_kernel(gradient)
            self.principal.written_back()
        else:  # also the first step, which creates the state
            values.grad = gradient.to(values.dtype) if gradient is not None else None
            super().step()
            values.grad = gradient  # float32, to accumulate the next one
            self.principal.write_back()
        return loss

    def _step_in_one_kernel(self, gradient: Tensor) -> None:
        group, state = self.param_groups[0], self.state[self.principal.values]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].to(gradient.device, torch.float64)
        scales = torch.stack([group["lr"] / (1 - beta1**step), (1 - beta2**step).rsqrt()])
        parts = self.principal.parts
        segments = [[p.begin, p.positions.numel(), p.positions.data_ptr(), p.memory.data_ptr()] for p in parts]
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
        error: Exception | None = None
        try:
            here = self._compiles()
        except Exception as caught:  # raised below: the other ranks wait in the collective
            here, error = False, caught
        compiles = torch.tensor(int(here), device=self.principal.values.device)
        if dist.is_initialized():
            dist.all_reduce(compiles, op=dist.ReduceOp.MIN)
        if error is not None:
            raise error
        return bool(compiles)

    def _compiles(self) -> bool:
        """Whether the kernel runs here; False if Triton is absent or lacks a compiler or a driver. Any other error is raised."""
        if len({matrix.dtype for matrix in self.principal.matrices}) > 1:
            return False  # the kernel writes weights of one dtype
        dummy = torch.zeros(2, device=self.principal.values.device)
        try:
            self._launch([[0, 0, 0, 0]], dummy, dummy, dummy, dummy, dummy)
        except Exception as error:
            if not _is_missing_toolchain(error):
                raise
            warnings.warn(
                f"no Triton kernel here, so AdamW and the write-back take separate passes over memory ({error})",
                stacklevel=3,
            )
            return False
        return True


def _is_missing_toolchain(error: Exception) -> bool:
    """Whether Triton cannot work on this machine: it is not installed, or its own code found no usable compiler or driver."""
    if isinstance(error, ImportError):
        return True
    own = isinstance(error, RuntimeError | OSError | subprocess.SubprocessError)
    innermost = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1:]
    return (
        own
        and not isinstance(error, torch.AcceleratorError)
        and any("triton" in Path(name).parts for name in innermost)
    )
