"""AdamW on the principal weights, fused with the write-back into the model.

An entry has an index (4 B), a gradient, a value and two moments (16 B). One kernel reads them once, and writes value, moments, a
cleared gradient and the weight in the model. Where the kernel does not run, torch's AdamW followed by
:meth:`PrincipalWeights.write_back` does the same in several passes over memory.

Values in bf16 are stepped by torch's AdamW alone: their gradient is rounded to bf16, once, and value and moments are read,
computed in float32, and rounded, as for any bf16 parameter. Where decay pulls towards the base model or moments are corrected by
entry, which torch's does not do, arithmetic of this module takes its place; it rounds once as well, and not the gradient.

Moments are corrected for the number of steps: that of the optimizer, or that of each entry. An entry that a refresh selects
late has moments of zero. Corrected for all steps its first one is lr (1 - beta1) / sqrt(1 - beta2): 0.447 lr with betas 0.9 and
0.95, 3.16 lr with 0.9 and 0.999. Corrected for its own it is lr, as it is for every entry at the start. With beta2 near 1 the
correction 1 - beta2^t has no digits left in float32 if the power is rounded first: it is computed as -expm1(t log beta2).
"""

from __future__ import annotations

import math
import subprocess
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.distributed.sharding import local_tensor
from liftdist.engine.elementwise import decay_target, in_float32
from liftdist.engine.principal import PrincipalWeights

BLOCK = 1024  # entries per program of the kernel


class PrincipalAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on ``principal.values`` whose ``step()`` includes ``principal.write_back()``.

    The optimizer state is that of ``torch.optim.AdamW``. ``in_one_kernel`` is True where Triton compiles the kernel on every
    rank; set it to False to use torch's implementation, on all ranks that hold the same weights. The constructor is collective.

    Args:
        by_age: correct the moments of each entry for its own number of steps, the state ``age`` ``[k_local]``.
        decay_to_base: let weight decay pull towards :attr:`PrincipalWeights.base_values` instead of zero.

    Raises:
        ValueError: ``by_age`` with values in bf16; ``decay_to_base`` without base values.
    """

    def __init__(
        self,
        principal: PrincipalWeights,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        by_age: bool = False,
        decay_to_base: bool = False,
    ) -> None:
        if by_age and principal.dtype != torch.float32:
            raise ValueError("by_age needs values in float32")
        decay_target(principal, decay_to_base)  # raises
        super().__init__([principal.values], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.by_age, self.decay_to_base = by_age, decay_to_base
        self._step_supports_amp_scaling = False  # GradScaler must unscale gradients and skip steps itself
        self.principal = principal
        fits = principal.dtype == torch.float32 and not (by_age or decay_to_base)
        self.in_one_kernel = fits and principal.values.is_cuda and self._compiles_everywhere()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the values, write them into the model, rounded, and clear the gradient. Returns the result of ``closure``."""
        self.principal.check_not_at_base()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values, gradient = self.principal.values, self.principal.values.grad
        unsupported = len(self.param_groups) > 1 or any(self.param_groups[0][key] for key in ("amsgrad", "maximize"))
        if self.in_one_kernel and self.principal.is_on_host:
            raise ValueError(
                "in_one_kernel needs values on the GPU: leave it False with PrincipalWeights(device='cpu')"
            )
        if (self.by_age or self.decay_to_base) and unsupported:
            raise ValueError("by_age and decay_to_base: not with amsgrad, maximize or several parameter groups")
        if self.in_one_kernel and not unsupported and gradient is not None and self.state[values] and values.numel():
            self._step_in_one_kernel(gradient)
            self.principal.written_back()
        elif self.by_age or self.decay_to_base:
            if gradient is not None:
                self._step_by_own_arithmetic(gradient)
            self.principal.write_back()
        else:  # also the first step, which creates the state
            values.grad = gradient.to(values.dtype) if gradient is not None else None
            super().step()
            values.grad = gradient  # float32, to accumulate the next one
            self.principal.write_back()
        return loss

    def _step_by_own_arithmetic(self, gradient: Tensor) -> None:
        group, values = self.param_groups[0], self.principal.values.detach()
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        state = self.state[self.principal.values]
        for key in _element_states(self.by_age) - set(state):
            state[key] = torch.zeros_like(values)
        state["step"] = state.get("step", torch.tensor(0.0)) + 1  # torch expects it in a state that is loaded
        age = state["age"].add_(1) if self.by_age else state["step"].to(values.device).expand_as(values)
        target = decay_target(self.principal, self.decay_to_base)
        vectors = values, gradient, state["exp_avg"], state["exp_avg_sq"], age, target
        for x, g, m, v, t, x0 in in_float32(*vectors):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            x.lerp_(x0, lr * group["weight_decay"])
            root = (v / _correction(beta2, t)).sqrt_().add_(eps)
            x.sub_(lr * m / _correction(beta1, t) / root)

    def _step_in_one_kernel(self, gradient: Tensor) -> None:
        group, state = self.param_groups[0], self.state[self.principal.values]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].to(gradient.device, torch.float64)
        scales = torch.stack([group["lr"] / (1 - beta1**step), (1 - beta2**step).rsqrt()])
        parts = self.principal.parts
        memory = [local_tensor(part.param).data_ptr() for part in parts]
        segments = [
            [part.begin, part.positions.numel(), part.positions.data_ptr(), begin]
            for part, begin in zip(parts, memory, strict=True)
        ]
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
        if self.principal.is_quantised or len({matrix.dtype for matrix in self.principal.matrices}) > 1:
            return False  # the kernel writes weights of one dtype, at their positions
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


def _correction(beta: float, steps: Tensor) -> Tensor:
    """``1 - beta^steps`` in float32, of whole numbers of steps from 1 on, to its last digits."""
    return torch.expm1(steps * (math.log(beta) if beta else -math.inf)).neg_()


def reference_eps(settings: Any, number: int) -> float:
    """Epsilon in the update ``number``, counted from 1, from the settings ``eps``, ``betas`` and ``reference_numerics``.

    The LIFT authors add it to the uncorrected denominator: (sqrt(v) / sqrt(c) + eps / sqrt(c)) is their (sqrt(v) + eps) / sqrt(c)
    with c = 1 - beta2^t.
    """
    return float(
        settings.eps / (1 - settings.betas[1] ** number) ** 0.5 if settings.reference_numerics else settings.eps
    )


def _element_states(by_age: bool) -> set[str]:
    return {"exp_avg", "exp_avg_sq"} | ({"age"} if by_age else set())


def element_states(settings: Any) -> set[str]:
    """Names of the optimizer's states with one element for each value, in its dtype."""
    return _element_states(settings.bias_correction == "entry")


def make(principal: PrincipalWeights, settings: Any) -> PrincipalAdamW:
    """From the settings ``lr``, ``betas``, ``eps``, ``weight_decay``, ``decay_towards`` and ``bias_correction``."""
    return PrincipalAdamW(
        principal,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        by_age=settings.bias_correction == "entry",
        decay_to_base=settings.decay_towards == "base",
    )
