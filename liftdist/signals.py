"""Signals that ask a process to stop. One that was ignored when the process began, as after ``nohup``, stays ignored.

    launcher     its handler passes them on to the ranks
    torchrun     has them blocked, as do the ranks until they are ready: a signal waits and is not lost
    a command    raises KeyboardInterrupt with the signal's name

Imports no torch.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from liftdist import environment

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class Interrupted(KeyboardInterrupt):
    """A class of its own: where a plain ``KeyboardInterrupt`` passes through ``exec`` of a text, as in the making of a dataclass,
    Python ends by SIGINT in the end even if it is caught."""


def forwarded() -> tuple[str, ...]:
    """Signals that reach ranks though all processes above them ignore them: the batch script's warning of the end."""
    return ("SIGUSR2",) if environment.LOGS.is_set() else ()


def handle(handler: Handler, names: Iterable[str] = STOP_SIGNALS, ignored_too: Iterable[str] = ()) -> None:
    """Install a handler for signals that are not ignored, or are in ``ignored_too``."""
    for name in names:
        number = signal.Signals[name]
        if name in ignored_too or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore all of ``STOP_SIGNALS``: this process is ending."""
    for name in STOP_SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)


def block() -> None:
    """Let ``STOP_SIGNALS`` wait, in this process and in those that it will start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in STOP_SIGNALS])


def unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[name] for name in STOP_SIGNALS])


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    block()
    try:
        yield
    finally:
        unblock()


def interrupt() -> None:
    """Raise ``KeyboardInterrupt``, with the name of the signal, wherever this process is when the first of them comes."""

    def received(number: int, _: FrameType | None) -> None:
        handle(signal.SIG_IGN, set(STOP_SIGNALS) - {"SIGINT"})  # service managers send two
        raise Interrupted(signal.Signals(number).name)

    handle(received)
