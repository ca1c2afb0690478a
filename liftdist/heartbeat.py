"""Signs of life, for others to see."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

HEARTBEAT = 5.0  # seconds between two signs of life, of an attempt or of a node: touches of its file


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """Call ``beat`` every ``HEARTBEAT`` seconds while the block runs, from a thread of its own. It may raise ``OSError``."""
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
        thread.join(HEARTBEAT)  # a file system that hangs must not hold the end
