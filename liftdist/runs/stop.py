"""Stop requests, and the points at which ranks act on them.

    signal, or the file run_dir/stop-requested  ->  a request of this rank  ->  at a boundary, a decision of all ranks

Imports torch late: a rank installs its signal handlers before its slow imports.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from liftdist import signals
from liftdist.runs.layout import STOP_REQUESTED
from liftdist.runs.watchdog import Watchdog
from liftdist.signals import STOP_SIGNALS

Progress = Callable[[int, int], None]  # called with (done, total)
_FILE_INTERVAL = 1.0  # seconds between two checks for the stop file


class StopRequests:
    """The stop request of this rank, from a signal or a file. Requests after the first are ignored."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._files: list[Path] = []
        self._last_check = 0.0

    def catch(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        """Treat these signals as stop requests, unless they were ignored when this process began, and give the rest of
        ``STOP_SIGNALS`` back their default action. A signal that came before and is blocked counts."""
        for name in STOP_SIGNALS:
            if name not in (*names, *signals.forwarded()) and signal.getsignal(signal.Signals[name]) == self._received:
                signal.signal(signal.Signals[name], signal.SIG_DFL)
        signals.handle(self._received, {*names, *signals.forwarded()}, signals.forwarded())
        signals.unblock()

    def _received(self, number: int, _: object) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def watch(self, run_dir: Path) -> None:
        """Treat the file ``stop-requested`` in ``run_dir`` as a stop request, too."""
        self._files.append(run_dir / STOP_REQUESTED)

    def check(self) -> None:
        """Raise :class:`liftdist.errors.Stopped` if this rank has a stop request. Not collective.

        For code whose errors are raised on all ranks afterwards.
        """
        from liftdist.errors import Stopped

        if self._files and time.monotonic() - self._last_check > _FILE_INTERVAL:
            self._last_check = time.monotonic()
            for file in self._files:
                with contextlib.suppress(OSError):
                    file.lstat()
                    self.reason = self.reason or STOP_REQUESTED
        if self.reason:
            raise Stopped(self.reason)

    def done(self) -> None:
        """Remove the stop files: the request has been carried out."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.unlink()


class CancellationPoint:
    """Called by long-running work: reports progress to the watchdog and acts on stop requests."""

    def __init__(self, stop: StopRequests | None = None, watchdog: Watchdog | None = None) -> None:
        self._stop, self._watchdog = stop or StopRequests(), watchdog
        self._failure: Exception | None = None  # of this rank

    def beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat()

    def check(self) -> None:
        """For code whose errors are raised on all ranks afterwards. Not collective."""
        self.beat()
        if self._failure is not None:
            raise self._failure
        self._stop.check()

    def boundary(self) -> None:
        """For code that all ranks reach together: as :meth:`check`, but raise on all ranks if any rank does. Collective, on the
        host."""
        from liftdist.distributed.collectives import agree, together

        error: Exception | None = None
        try:
            self.check()
        except Exception as caught:
            error = caught
        if agree(error is not None):
            with together():
                if error is not None:
                    raise error

    def fail(self, error: Exception) -> None:
        """Raise an error of this rank on all ranks at the next boundary of this run."""
        self._failure = self._failure or error

    def checking(self, progress: Progress) -> Progress:
        """``progress``, followed by :meth:`check` at each call."""
        return _both(progress, self.check)

    def at_boundaries(self, progress: Progress) -> Progress:
        """``progress``, followed by :meth:`boundary` at each call, which is then collective."""
        return _both(progress, self.boundary)


def _both(progress: Progress, then: Callable[[], None]) -> Progress:
    def both(done: int, total: int) -> None:
        progress(done, total)
        then()

    return both
