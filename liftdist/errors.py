"""Errors that mean something to the command line, and the exit codes they become."""

from __future__ import annotations

EXIT_USER_ERROR = 2  # exit code for anything the user can put right
EXIT_STOPPED = 75  # exit code of a run that stopped when asked to: the same command continues it


class UserError(ValueError):
    """Something the user can put right. Shown as one line, without a traceback, with exit code 2."""


class PeerError(RuntimeError):
    """Another rank failed, and reports why; this one only stops with it."""


class Stopped(Exception):
    """All ranks have agreed to stop; the message is the reason. Not an error: nothing is lost."""
