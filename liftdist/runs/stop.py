"""Requests to stop, and where they are heard.

    signal, or the file run_dir/stop-requested  ->  a request of this rank  ->  at a boundary, a decision of all ranks

Imports no torch before it must: signals are caught before a rank has finished importing.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from liftdist.runs.layout import STOP_REQUESTED
from liftdist.runs.watchdog import Watchdog
from liftdist.schema import STOP_SIGNALS

Progress = Callable[[int, int], None]  # called with what is done and all there is to do
_FILE_INTERVAL = 1.0  # seconds between two looks for the file that asks to stop


class StopRequests:
    """The wish to stop, however it comes. A second one changes nothing."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.failure: Exception | None = None  # of this rank, for all ranks to hear of at the next boundary
        self._file: Path | None = None
        self._looked = 0.0

    def catch(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        """Take these signals as a wish to stop, and none of the others any more."""
        for name in STOP_SIGNALS:
            number = signal.Signals[name]
            if name in names:
                signal.signal(number, self._received)
            elif signal.getsignal(number) == self._received:
                signal.signal(number, signal.SIG_DFL)

    def ignore(self) -> None:
        """Take no notice of signals any more: this process is ending."""
        for name in STOP_SIGNALS:
            signal.signal(signal.Signals[name], signal.SIG_IGN)

    def _received(self, number: int, _: object) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def watch(self, run_dir: Path) -> None:
        """Take the file ``stop-requested`` in ``run_dir`` as a wish to stop, too."""
        self._file = run_dir / STOP_REQUESTED

    def check(self) -> None:
        """Raise ``failure``, or :class:`liftdist.errors.Stopped` if this rank wishes to stop.

        For places where an error of one rank becomes all ranks'.
        """
        from liftdist.errors import Stopped

        if self._file is not None and time.monotonic() - self._looked > _FILE_INTERVAL:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):
                self._file.lstat()
                self.reason = self.reason or STOP_REQUESTED
        if self.failure is not None:
            raise self.failure
        if self.reason:
            raise Stopped(self.reason)

    def boundary(self) -> None:
        """Raise :class:`liftdist.errors.Stopped` on all ranks if any of them wishes to stop. Collective, on the host."""
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

    def done(self) -> None:
        """The wish is fulfilled: the file has done its work."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()


class CancellationPoint:
    """What long work calls while it goes on: it beats the watchdog, and is where a wish to stop is heard."""

    def __init__(self, stop: StopRequests | None = None, watchdog: Watchdog | None = None) -> None:
        self._stop, self._watchdog = stop or StopRequests(), watchdog

    def beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat()

    def check(self) -> None:
        """Where an error of one rank becomes all ranks' later."""
        self.beat()
        self._stop.check()

    def boundary(self) -> None:
        """Where all ranks are at the same place. Collective."""
        self.beat()
        self._stop.boundary()

    def fail(self, error: Exception) -> None:
        """Have all ranks hear of an error of this one at the next boundary."""
        self._stop.failure = self._stop.failure or error

    def checking(self, progress: Progress) -> Progress:
        """``progress`` with a check each time."""
        return _both(progress, self.check)

    def at_boundaries(self, progress: Progress) -> Progress:
        """``progress`` with a boundary each time. Collective."""
        return _both(progress, self.boundary)


def _both(progress: Progress, then: Callable[[], None]) -> Progress:
    def both(done: int, total: int) -> None:
        progress(done, total)
        then()

    return both
