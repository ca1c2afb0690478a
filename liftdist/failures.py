"""How ranks ended that did not end well: each leaves a record, and the first of a job is the one to show.

    LIFTDIST_FAILURES/rank-00003.failure.json      one a rank, by the rank itself or by the launcher that saw it die

A rank that only lost its peers records that: its error is shown only if there is no other. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from liftdist import environment, files
from liftdist.errors import EXIT_USER_ERROR
from liftdist.redaction import redact

BUG, USER_ERROR, LOST_PEERS = range(3)  # kinds, the first to show first
MOST_RANKS = 1 << 20  # of a job; a record with more is invalid
#: How gloo reports a lost peer in a plain RuntimeError: with a location in its own source, or with exactly this text.
_GLOO = re.compile(
    r"(Gloo connectFullMesh failed with )?\[\S*/gloo/\S+:\d+\] |Application timeout caused pair closure$"
)


@dataclass(frozen=True)
class Failure:
    rank: int
    world_size: int
    host: str
    time: float  # seconds since the epoch
    error: str  # one line
    trace: str = ""
    kind: int = BUG


def start() -> None:
    """At the start of a rank: let the launcher know, forget what an earlier attempt of the rank left, and keep its output apart
    unless it is the main one.

    Ends the rank where it cannot have its output there.
    """
    try:
        if (status := environment.STATUS_FILE.get()) is not None:
            with contextlib.suppress(OSError):
                status.touch()
        if (folder := environment.FAILURES.get()) is not None:
            _path(folder, _rank()).unlink(missing_ok=True)
        if is_apart():
            with files.open_to_append(environment.LOGS.need() / f"rank-{_rank():05d}.log") as file:
                for descriptor in (1, 2):
                    os.dup2(file.fileno(), descriptor)
    except OSError as error:
        text = f"rank {_rank()} on {platform.node()}: {files.reason(error)}"
        if not say(text, USER_ERROR):
            sys.stderr.write(f"liftdist: {redact(text)}\n")
        sys.exit(EXIT_USER_ERROR)


def is_apart() -> bool:
    """Whether this rank's output goes to a file of its own."""
    return environment.LOGS.is_set() and _rank() > 0


def record(error: BaseException) -> bool:
    """Leave a record of what ended this rank. Whether there is a launcher to show it."""
    found = [line for line in str(error).splitlines() if line.strip()] or [""]
    trace = "".join(traceback.format_exception(error))
    return say(f"{type(error).__name__}: {found[0]:.400}", LOST_PEERS if _is_lost_peer(error) else BUG, trace)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective raised ``error`` because a peer or the connection to it failed; its text alone decides nothing."""
    # a module that is not imported cannot have raised it
    raised_by_torch = getattr(sys.modules.get("torch.distributed"), "DistError", ())
    return isinstance(error, raised_by_torch) or (type(error) is RuntimeError and _GLOO.match(str(error)) is not None)


def say(text: str, kind: int = BUG, trace: str = "") -> bool:
    """:func:`record` for what is no exception, or needs no traceback."""
    if (folder := environment.FAILURES.get()) is None:
        return False
    world_size = environment.WORLD_SIZE.get(1)
    return write(folder, Failure(_rank(), world_size, platform.node(), time.time(), redact(text), redact(trace), kind))


def _rank() -> int:
    return environment.RANK.get(0)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.failure.json"


def write(folder: Path, failure: Failure) -> bool:
    """Keep ``failure``, unless the rank has left a record before. Whether there is one now."""
    path = _path(folder, failure.rank)
    try:
        files.create(path, json.dumps(asdict(failure)))
    except FileExistsError:
        return not path.is_symlink()  # links are not read
    except OSError:
        return False
    return True


def read(folder: Path) -> list[Failure]:
    """The failures of a job: by their kind, then by their time. What is no record is left out."""
    found = []
    for path in folder.glob("rank-*.failure.json"):
        try:
            failure = Failure(**json.loads(files.read(path)))
        except (OSError, ValueError, TypeError):
            continue
        if _is_sound(failure):
            found.append(failure)
    return sorted(found, key=lambda failure: (failure.kind, failure.time))


def _is_sound(failure: Failure) -> bool:
    """Whether each field is what it should be: a record may come from another version or another program."""
    texts = (failure.host, failure.error, failure.trace)
    numbers = (failure.rank, failure.world_size, failure.kind)
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in numbers)
        and isinstance(failure.time, int | float)
        and failure.kind in (BUG, USER_ERROR, LOST_PEERS)
        and failure.world_size <= MOST_RANKS
    )


def summary(found: Sequence[Failure]) -> str | None:
    """The message for the user: one failure, its rank, and its traceback. None if nothing is known."""
    if not found:
        return None
    first = found[0]
    if first.kind == USER_ERROR:
        return first.error
    whose = f"rank {first.rank} on {first.host}"
    if first.kind == BUG:
        return f"{whose} failed first: {first.error}\n{first.trace}".rstrip()
    silent = sorted(set(range(max(f.world_size for f in found))) - {f.rank for f in found})
    if not silent:
        return f"{whose} lost its peers first: {first.error}"
    names = ("ranks " if len(silent) > 1 else "rank ") + ", ".join(map(str, silent[:8])) + ", ..." * (len(silent) > 8)
    return f"{names} ended without a message before the run did; {whose} noticed first: {first.error}"
