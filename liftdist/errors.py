"""Exceptions that the command line handles, and their exit codes."""

from __future__ import annotations

EXIT_USER_ERROR = 2  # exit code for anything the user can correct
EXIT_STOPPED = 75  # exit code of a run that stopped on request: the same command continues it


class UserError(ValueError):
    """Something the user can correct. Shown as one line, without a traceback, with exit code 2."""


class PeerError(RuntimeError):
    """Another rank failed and reports the cause; this rank stops because of it."""


class Stopped(Exception):
    """All ranks have agreed to stop; the message is the reason. Not an error: nothing is lost."""
