"""Messages and progress on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from liftdist.redaction import redact

GIB = 2**30
_EVERY = 10.0  # seconds between two lines of progress without a terminal


class Console:
    """Messages and progress: bars on a terminal, plain lines elsewhere. Only the main rank prints.

    Args:
        of: what they are about, if there are several: stands before each.
    """

    def __init__(self, enabled: bool, of: str = "") -> None:
        self._enabled = enabled
        self._bars = enabled and _columns() > 0
        self._prefix = f"{of}: " if of else ""

    def say(self, message: str) -> None:
        if self._enabled:
            tqdm.write(redact(self._prefix + message), file=sys.stderr)

    @contextmanager
    def progress(self, title: str, unit: str, total: int | None = None) -> Iterator[Progress]:
        shown = self._prefix + title
        bar = tqdm(total=total, desc=shown, unit=f" {unit}", disable=not self._bars, leave=False, dynamic_ncols=True)
        progress = Progress(title, unit, bar, self if not self._bars else None)
        try:
            yield progress
        finally:
            progress.close()


def _columns() -> int:
    """Width of the terminal; 0 if there is none, or it does not know, as under some tools that provide one."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


class Progress:
    """A progress counter. Without a terminal it prints a line at most every ten seconds, and at each :meth:`step`."""

    def __init__(self, title: str, unit: str, bar: tqdm, console: Console | None) -> None:
        self._title, self._unit, self._bar, self._console = title, unit, bar, console
        self._last_print = time.monotonic()
        self._total: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done; a ``total`` of 0 is not known yet. What is done at first has no rate."""
        now = time.monotonic()
        if total != self._total:
            self._total, self._first, self._began = total, done, now
            self._bar.reset(total or None)
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.update(done - self._bar.n)
        if self._console is not None and now - self._last_print > _EVERY:
            self._console.say(f"{self._title}: {self._state(done, total, now - self._began)}")
            self._last_print = now

    def _state(self, done: int, total: int, seconds: float) -> str:
        if not total:
            return f"{done} {self._unit} so far"
        rate = (done - self._first) / seconds if seconds else 0.0
        if not rate:
            return f"{done} of {total}"
        return (
            f"{done} of {total} {self._unit}, {rate:.{0 if rate >= 10 else 2}f}/s, {_clock((total - done) / rate)} left"
        )

    def close(self) -> None:
        """Print nothing more, even if the counter is still called."""
        self._bar.close()
        self._console = None

    def step(self, done: int, total: int, note: str, seconds_left: float) -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._console is not None:
            self._console.say(f"{self._title} {done}/{total}  {note}  {_clock(seconds_left)} left")


def _clock(seconds: float) -> str:
    left = int(seconds)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
