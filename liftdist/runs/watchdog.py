"""What reaches a rank from outside, and what becomes of a rank whose peers are silent.

    signal, or the file run_dir/stop-requested  ->  a wish of this rank  ->  at a boundary, a decision of all ranks

Imports no torch before it must: signals are caught before a rank has finished importing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from liftdist import failures, files
from liftdist.runs.claims import STOP_REQUESTED
from liftdist.schema import STOP_SIGNALS

Progress = Callable[[int, int], None]  # called with what is done and all there is to do

_PR_SET_PDEATHSIG = 1
_LAST_WORDS = 8.0  # seconds from the end of patience to the end of the process
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
        """Raise ``failure``, or :class:`liftdist.mesh.Stopped` if this rank wishes to stop.

        For places where an error of one rank becomes all ranks'.
        """
        from liftdist.distributed.mesh import Stopped

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
        """Raise :class:`liftdist.mesh.Stopped` on all ranks if any of them wishes to stop. Collective, on the host."""
        from liftdist.distributed.mesh import agree, together

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


def die_with_parent() -> None:
    """Have this process killed when the agent that started it dies, so that no rank outlives its job."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)


class Pulse:
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


class Watchdog:
    """Ends this rank when it makes no progress, and leaves the stacks of all its threads in ``folder``."""

    def __init__(self, seconds: float, folder: Path, rank: int, ranks: int) -> None:
        self._seconds, self._folder, self._rank, self._ranks = seconds, folder, rank, ranks
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """There was progress."""
        self._beaten = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the block ends; ``seconds`` of 0 never bite."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, self._seconds / 4)):
                if time.monotonic() - self._beaten > self._seconds:
                    self._bite()

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        if self._seconds:
            thread.start()
        try:
            yield
        finally:
            ended.set()

    def _bite(self) -> None:
        # the file system may be what hangs: this rank ends all the same
        threading.Timer(_LAST_WORDS, os._exit, (1,)).start()
        message = f"no progress for {self._seconds:.0f} s (train.hang_timeout); stacks in {self._folder}"
        print(f"liftdist: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        failures.say(message, failures.LOST_PEERS)
        try:
            files.real_folder(self._folder)
            descriptor = os.open(self._stacks(self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with os.fdopen(descriptor, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(_LAST_WORDS / 2)  # the others bite in the meantime
            stuck = [rank for rank in range(self._ranks) if self._stacks(rank).exists()]
            silent = sorted(set(range(self._ranks)) - set(stuck))
            if self._rank == stuck[0] and silent:
                names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
                print(
                    f"liftdist: {len(stuck)} of {self._ranks} ranks wait; no sign of rank {names}: "
                    f"stopped, or its machine is gone",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            os._exit(1)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"
