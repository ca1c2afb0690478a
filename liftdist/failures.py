"""How ranks ended that did not end well: each leaves a record, and the first of a job is the one to show.

    LIFTDIST_FAILURES/rank-00003.failure.json      one a rank, by the rank itself or by the launcher that saw it die

A rank that merely lost its peers says so in its record: what it saw is noise, unless there is nothing else. Imports no torch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from liftdist.redaction import redact

FOLDER, LOGS = "LIFTDIST_FAILURES", "LIFTDIST_LOGS"  # environment variables: folders for records, for output
BUG, USER_ERROR, LOST_PEERS = range(3)  # kinds, the first to show first
_LOST_PEERS = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|timed out|timeout|socket|NCCL|recv|remote process", re.I
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
    """At the start of a rank: forget what an earlier attempt of it left, and keep its output apart unless it is the main one."""
    if (folder := os.environ.get(FOLDER)) is not None:
        _path(Path(folder), _rank()).unlink(missing_ok=True)
    if is_apart():
        with (Path(os.environ[LOGS]) / f"rank-{_rank():05d}.log").open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)


def is_apart() -> bool:
    """Whether this rank's output goes to a file of its own."""
    return LOGS in os.environ and _rank() > 0


def record(error: BaseException) -> bool:
    """Leave a record of what ended this rank. Whether there is a launcher to show it."""
    found = [line for line in str(error).splitlines() if line.strip()] or [""]
    # collectives raise nothing more telling than a RuntimeError
    lost = isinstance(error, RuntimeError) and _LOST_PEERS.search(str(error))
    trace = "".join(traceback.format_exception(error))
    return say(f"{type(error).__name__}: {found[0]:.200}", LOST_PEERS if lost else BUG, trace)


def say(text: str, kind: int = BUG, trace: str = "") -> bool:
    """:func:`record` for what is no exception, or needs no traceback."""
    if (folder := os.environ.get(FOLDER)) is None:
        return False
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return write(
        Path(folder), Failure(_rank(), world_size, platform.node(), time.time(), redact(text), redact(trace), kind)
    )


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.failure.json"


def write(folder: Path, failure: Failure) -> bool:
    """Keep ``failure``, unless the rank has left a record before. Whether there is one now."""
    try:
        with _path(folder, failure.rank).open("x") as file:
            file.write(json.dumps(asdict(failure)))
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def read(folder: Path) -> list[Failure]:
    """The failures of a job: by their kind, then by their time."""
    found = []
    for path in folder.glob("rank-*.failure.json"):
        try:
            found.append(Failure(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda failure: (failure.kind, failure.time))


def summary(found: Sequence[Failure]) -> str | None:
    """What to tell the user: one failure, whose it was, and its traceback. None if nothing is known."""
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
    return f"{names} ended without a word before the run did; {whose} noticed first: {first.error}"
