"""Standard output and error that never end a process: what cannot be written is dropped.

    write -> queue of at most LIMIT bytes -> a thread -> the terminal, pipe or file

A terminal that was closed, a pipe whose reader has gone, a full disk or an encoding without a character raise nothing. A reader
that has stopped reading delays nothing: when the queue is full its oldest text is dropped, and the gap is marked.

A *patient* stream has no queue and waits for its reader: for a command whose output is its result. Imports no torch.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

LIMIT = 1 << 20  # bytes that wait for a reader
DRAIN = 2.0  # seconds that the end of a process waits for its reader


def take_over(patient: bool = False) -> None:
    """Replace ``sys.stdout`` and ``sys.stderr``.

    Args:
        patient: whether ``sys.stdout`` waits for its reader.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller: the next file to be opened must not take its place
            os.open(os.devnull, os.O_RDWR)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` stops jobs in the background that print
    sys.stdout, sys.stderr = Output(1, patient), Output(2)
    atexit.register(drain)


def drain() -> None:
    """Wait until all is written, at most ``DRAIN`` seconds. To be called before ``os._exit``."""
    ends = time.monotonic() + DRAIN
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):
            stream.drain(ends - time.monotonic())


def lost() -> OSError | None:
    """Why a part of a patient ``sys.stdout`` was not written. A reader that has gone, as ``head`` does, is no reason."""
    error = sys.stdout.error if isinstance(sys.stdout, Output) else None
    return None if error is None or error.errno == errno.EPIPE else error


def reader_has_gone() -> bool:
    """Whether nobody reads a patient ``sys.stdout`` any more."""
    error = sys.stdout.error if isinstance(sys.stdout, Output) else None
    return error is not None and error.errno == errno.EPIPE


class Output(io.TextIOBase):
    """A text stream over a file descriptor."""

    def __init__(self, descriptor: int, patient: bool = False) -> None:
        self._descriptor, self._patient = descriptor, patient
        self.error: OSError | None = None  # the first of a patient stream, which then writes no more
        self.buffer = _Bytes(self)
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Begin with an empty queue and no thread, as a forked process must."""
        self._queue: deque[bytes] = deque()
        self._waiting = self._dropped = 0  # bytes
        self._writing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.write_bytes(_encoded(text))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        if self._patient:
            if isinstance(sys.stderr, Output):
                sys.stderr.drain(0.2)  # what was printed there before comes before
            if self.error is None:
                self.error = self._put(data)
            return
        with self._changed:
            self._queue.append(data)
            self._waiting += len(data)
            while self._waiting > LIMIT:  # the newest text is kept: it says how things end
                self._dropped += len(self._queue[0])
                self._waiting -= len(self._queue.popleft())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="output", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue)
                gap = (
                    f"\n[{self._dropped} bytes are missing here: nobody was reading]\n".encode()
                    if self._dropped
                    else b""
                )
                data = gap + b"".join(self._queue)
                self._queue.clear()
                self._waiting = self._dropped = 0
                self._writing = True
            self._put(data)

    def _put(self, data: bytes) -> OSError | None:
        """Write to the descriptor. Returns what made that fail."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:  # another process has made a shared terminal non-blocking
                time.sleep(0.01)
            except OSError as error:
                return error
        return None

    def drain(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._writing, max(0.0, seconds))


class _Bytes(io.RawIOBase):
    """``buffer`` of a text stream."""

    def __init__(self, stream: Output) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._stream.write_bytes(bytes(data))
        return len(data)


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")  # a file name that is not UTF-8 keeps its bytes
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")
