"""Vectors that stay on the host while the model computes on its device, and what travels between the two.

to the host      the principal entries of each gradient, as soon as it is reduced        on a stream of its own
to the device    positions, where entries are taken or written; values after a step      on the current stream

Where CUDA is, what travels lies in pinned memory, so that the processor waits for no copy but the last one of a backward. A copy
to the device is made from a buffer that nobody else writes, and that PyTorch does not hand out again before the copy has ended.
Values, gradient and moments are ordinary memory: PyTorch takes pinned memory in powers of two.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def empty(numel: int, dtype: torch.dtype) -> Tensor:
    """``[numel]`` on the host, pinned where CUDA is."""
    return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())


def kept(vector: Tensor) -> Tensor:
    """A copy of ``vector [k]`` on the host."""
    return empty(vector.numel(), vector.dtype).copy_(vector)


def sent(vector: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[k]`` in ``dtype`` on ``device``: of ``vector`` on the host, which may be changed as soon as this returns."""
    return empty(vector.numel(), dtype).copy_(vector).to(device, non_blocking=True)


class Arrivals:
    """Vectors on their way to the host, each to be added to another one there.

    All have been added when the backward ends in which they were sent.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def add(self, target: Tensor, vector: Tensor) -> None:
        """Add ``vector [k]``, which the current stream computes, to ``target [k]`` on the host. In a backward only."""
        self._pending.append((target, *self._copied(vector)))
        while len(self._pending) > 1 and _has_arrived(self._pending[0][2]):
            self._add_first()
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Wait for all."""
        while self._pending:
            self._add_first()

    def drop(self) -> None:
        """Add none of those that a backward which failed has left."""
        self._pending.clear()

    def _copied(self, vector: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        staged = empty(vector.numel(), vector.dtype)
        if not (torch.cuda.is_available() and vector.is_cuda):
            return staged.copy_(vector), None
        if self._stream is None:
            self._stream = torch.cuda.Stream(vector.device)
        self._stream.wait_stream(torch.cuda.current_stream(vector.device))
        with torch.cuda.stream(self._stream):
            staged.copy_(vector, non_blocking=True)
        vector.record_stream(self._stream)
        return staged, self._stream.record_event()

    @torch.no_grad()
    def _add_first(self) -> None:
        target, staged, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        target += staged


def _has_arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
