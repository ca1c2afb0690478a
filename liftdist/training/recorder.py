"""What a run tells: TensorBoard and ``metrics.jsonl`` in the run directory, a progress bar or plain lines on the console."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from liftdist import files
from liftdist.config import redact
from liftdist.runs.claims import TENSORBOARD

GIB = 2**30


class Recorder:
    """Writes scalars and texts to TensorBoard and ``metrics.jsonl``. Only the main rank writes.

    Args:
        after: the step after which recording goes on; what an earlier attempt recorded beyond it is taken back. None: all.
        say: told when the disk takes no more. Training goes on without curves.
    """

    def __init__(
        self, run_dir: Path, enabled: bool, after: int | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._writer: SummaryWriter | None = None
        self._file: TextIO | None = None
        self._say, self._failed = say, False
        self._purge_step = None if after is None else after + 1
        if not enabled:
            return
        path = run_dir / "metrics.jsonl"
        if after is not None and path.exists() and not path.is_symlink():
            with path.open(encoding="utf-8") as earlier:
                files.write(path, "".join(line for line in earlier if _step(line) <= after))
        self._file = files.open_to_append(path)
        self._folder = files.real_folder(run_dir / TENSORBOARD)

    def _tensorboard(self) -> SummaryWriter:
        """The writer, a new one if the last one failed: it does not recover."""
        if self._writer is None:
            self._writer, self._purge_step = SummaryWriter(str(self._folder), purge_step=self._purge_step), None
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        with self._tolerant():
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
            self._file.flush()
            for tag, value in values.items():
                self._tensorboard().add_scalar(tag, value, step)
            self._tensorboard().flush()
            self._failed = False

    def text(self, tag: str, text: str) -> None:
        if self._file is not None:
            with self._tolerant():
                self._tensorboard().add_text(tag, "\n".join(f"    {line}" for line in redact(text).splitlines()))

    def close(self) -> None:
        for file in (self._writer, self._file):
            if file is not None:
                with self._tolerant():
                    file.close()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._say(f"metrics cannot be recorded, training goes on: {error}")
            self._failed, self._writer = True, None


def _step(line: str) -> float:
    """The step of a line of metrics; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Console:
    """Messages and progress on stderr: bars on a terminal, plain lines elsewhere. Only the main rank speaks."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bars = enabled and sys.stderr.isatty()

    def say(self, message: str) -> None:
        if self._enabled:
            tqdm.write(redact(message), file=sys.stderr)
            sys.stderr.flush()

    @contextmanager
    def progress(self, title: str, unit: str, total: int | None = None) -> Iterator[Progress]:
        bar = tqdm(total=total, desc=title, unit=unit, disable=not self._bars, leave=False, dynamic_ncols=True)
        progress = Progress(title, bar, self if not self._bars else None)
        try:
            yield progress
        finally:
            progress.close()


class Progress:
    """One advancing count. Without a terminal it speaks at most every ten seconds, and with each note."""

    def __init__(self, title: str, bar: tqdm, console: Console | None) -> None:
        self._title, self._bar, self._console = title, bar, console
        self._spoke = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._console is not None and time.monotonic() - self._spoke > 10:
            self._console.say(f"{self._title}: {done} of {total}")
            self._spoke = time.monotonic()

    def close(self) -> None:
        """Say nothing more, whoever still counts."""
        self._bar.close()
        self._console = None

    def step(self, done: int, total: int, note: str, seconds_left: float) -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._console is not None:
            left = int(seconds_left)
            clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            self._console.say(f"{self._title} {done}/{total}  {note}  {clock} left")


class Stopwatch:
    """Seconds spent in named phases. On a GPU the phases are timed by events and nothing waits until they are read."""

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
        """Seconds by phase since the last read."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for phase, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            totals[phase] = totals.get(phase, 0.0) + seconds
        self._spans.clear()
        return totals


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this rank, GiB: of its device (allocated, reserved and peak) and of the host (resident and peak)."""
    figures = {}
    if device.type == "cuda":
        figures["device_allocated"] = torch.cuda.memory_allocated(device) / GIB
        figures["device_reserved"] = torch.cuda.memory_reserved(device) / GIB
        figures["device_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, key in (("host_resident", "VmRSS"), ("host_peak", "VmHWM")):
        figures[name] = int(status[key].split()[0]) * 1024 / GIB
    return figures
