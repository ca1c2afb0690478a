"""Periodic heartbeats, by which other processes see that this one is alive."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

HEARTBEAT = 5.0  # seconds between two heartbeats of an attempt or of a node: each touches its file


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """Call ``beat`` every ``HEARTBEAT`` seconds during the block, from a thread of its own. ``OSError`` is ignored."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(HEARTBEAT)  # a file system that hangs must not block the exit
