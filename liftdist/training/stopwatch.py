"""Seconds per phase, and memory in use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from liftdist.console import GIB


class Stopwatch:
    """Seconds spent in named phases. On a GPU phases are timed by events, and only :meth:`read` synchronises."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((phase, begin, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last read."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for phase, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            totals[phase] = totals.get(phase, 0.0) + seconds
        self._spans.clear()
        return totals


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this rank in GiB: of its device (allocated, reserved, peak) and of the host (resident, peak)."""
    figures = {}
    if device.type == "cuda":
        figures["device_allocated"] = torch.cuda.memory_allocated(device) / GIB
        figures["device_reserved"] = torch.cuda.memory_reserved(device) / GIB
        figures["device_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, key in (("host_resident", "VmRSS"), ("host_peak", "VmHWM")):
        figures[name] = int(status[key].split()[0]) * 1024 / GIB
    return figures
