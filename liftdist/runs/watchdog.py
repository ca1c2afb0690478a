"""Ends a rank that makes no progress, or whose torchrun agent has died."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from liftdist import failures, files, output

_GRACE = 8.0  # seconds from the timeout to the forced exit, to write stacks and report


class Watchdog:
    """Ends this rank after ``seconds`` without progress, and writes the stacks of all its threads to ``folder``."""

    def __init__(self, seconds: float, folder: Path, rank: int, ranks: int) -> None:
        self._seconds, self._folder, self._rank, self._ranks = seconds, folder, rank, ranks
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """Report progress."""
        self._beaten = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs; ``seconds=0`` disables it."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, self._seconds / 4)):
                if time.monotonic() - self._beaten > self._seconds:
                    self._expire()

        thread = threading.Thread(target=watch, name="watchdog", daemon=True)
        if self._seconds:
            thread.start()
        try:
            yield
        finally:
            ended.set()

    def _expire(self) -> None:
        # the file system itself may hang, so that nothing below returns
        threading.Timer(_GRACE, os._exit, (1,)).start()
        message = f"no progress for {self._seconds:.0f} s (train.hang_timeout); stacks in {self._folder}"
        print(f"liftdist: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        failures.say(message, failures.LOST_PEERS)
        try:
            files.real_folder(self._folder)
            descriptor = os.open(self._stacks(self._rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            with os.fdopen(descriptor, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(_GRACE / 2)  # the other ranks write theirs meanwhile
            stuck = [rank for rank in range(self._ranks) if self._stacks(rank).exists()]
            silent = sorted(set(range(self._ranks)) - set(stuck))
            if self._rank == stuck[0] and silent:
                names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
                print(
                    f"liftdist: {len(stuck)} of {self._ranks} ranks are waiting; rank {names} wrote no stacks: "
                    f"check whether the process and its machine are alive",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            output.drain()
            os._exit(1)

    def _stacks(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"
