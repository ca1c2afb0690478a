"""The run directory: who may write into it, and what earlier attempts left there.

    attempts/attempt-00000003.jsonl     one line an event, written by rank 0 of the third attempt at this run:
        {"event": "claim", "nonce": ..., "job": ..., "process": ..., "accepts": {"step-00000100": sha256 of its manifest, ...}}
        {"event": "commit", "step": 200, ...}   {"event": "end", "outcome": "stopped", ...}

An attempt claims the run by creating its file exclusively. The time of the file is its heartbeat: while it is fresh and the
attempt has not ended, nobody else may claim the run. What counts is what the newest attempt accepts or has written itself, so a
rank left over from an older one can still write, but is never believed.

Imports no torch: whether a run directory is free is known before anything is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftdist import __version__, environment, files
from liftdist.errors import UserError
from liftdist.heartbeat import heartbeat
from liftdist.runs.layout import ATTEMPTS, CHECKPOINTS, LOGS, STOP_REQUESTED, TENSORBOARD

LEASE = 90.0  # seconds after which an attempt that was not touched is dead; file systems cache times for up to 60

Event = dict[str, Any]


class Superseded(UserError):
    """A newer attempt has claimed the run: this one must stop, and may no longer write."""


def attempts(run_dir: Path) -> dict[int, list[Event]]:
    """The events of every attempt, by number. A later line that was cut short is left out.

    Raises:
        UserError: a file is damaged or cannot be read: what it vouches for must not pass for absent.
    """
    found: dict[int, list[Event]] = {}
    for number in _numbers(run_dir):
        path = _path(run_dir, number)
        try:
            first, *others = files.read(path).splitlines() or [""]
            claim = json.loads(first)
            if claim["event"] != "claim" or claim["attempt"] != number:
                raise ValueError("is not the claim of this attempt")
        except OSError as error:
            raise UserError(files.reason(error)) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: {error}; --fresh starts again in a new directory") from None
        found[number] = [claim]
        for line in others:
            with contextlib.suppress(ValueError):
                found[number].append(json.loads(line))
    return found


def _numbers(run_dir: Path) -> list[int]:
    """The attempts whose files exist, in order."""
    names = [path.stem.removeprefix("attempt-") for path in (run_dir / ATTEMPTS).glob("attempt-*.jsonl")]
    return sorted(int(name) for name in names if name.isdigit())


def check_free(run_dir: Path) -> None:
    """Create ``run_dir`` if need be.

    Raises:
        UserError: it is somebody else's folder, another job works in it, or it cannot be written.
    """
    try:
        if run_dir.exists() and (
            not run_dir.is_dir() or (any(run_dir.iterdir()) and not (run_dir / ATTEMPTS).is_dir())
        ):
            raise UserError(f"run_dir {run_dir}: exists and holds no run; give another one (run_dir=...)")
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (ATTEMPTS, CHECKPOINTS, TENSORBOARD, LOGS):
            files.check_real_folder(run_dir / name)
        files.real_folder(run_dir / ATTEMPTS)
        with tempfile.TemporaryFile(dir=run_dir / ATTEMPTS) as file:
            now = os.fstat(file.fileno()).st_mtime  # by the clock of the file system, as heartbeats are
        history = attempts(run_dir)
        if history:
            newest = max(history)
            _check_dead(run_dir, _path(run_dir, newest), history[newest], now)
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written: {error.strerror}") from None


def _check_dead(run_dir: Path, path: Path, events: list[Event], now: float) -> None:
    claim = events[0]
    silent = now - path.stat().st_mtime
    if any(event.get("event") == "end" for event in events) or silent > LEASE:
        return
    process = claim["process"]
    if _is_gone(process) or _is_earlier(claim["job"], claim.get("launch")):
        return
    name = f"job {claim['job']['id']}, " if claim["job"] else ""
    raise UserError(
        f"run_dir {run_dir}: in use by {name}process {process['pid']} on {process['host']} (attempt {claim['attempt']}, "
        f"heard of {max(silent, 0):.0f} s ago); if it is dead, its claim ends {LEASE:.0f} s after its last sign of life"
    )


def _job() -> dict[str, str] | None:
    """The SLURM job of this process, and which start of it."""
    job = environment.SLURM_JOB_ID.get()
    return None if job is None else {"id": f"slurm {job}", "time": environment.slurm_start()}


def _is_earlier(job: Mapping[str, str] | None, launch: str | None) -> bool:
    """Whether a claim is of an earlier start of this job, or of this very start, whose ranks were started again since."""
    mine = _job()
    if launch is not None and launch == environment.LAUNCH.get():
        return environment.AGENT_RESTARTS.get(0) > 0  # torchrun has ended the ranks before
    if mine is None or job is None:
        return False
    if mine["id"] == job["id"]:
        return mine["time"] != job["time"]  # requeued, or restarted by its batch script
    return job["id"] == f"slurm {environment.AFTER_JOB.get()}"  # which this one was made to wait for


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "namespace": str(Path("/proc/self/ns/pid").readlink()),
        "pid": os.getpid(),
        "started": _process_state(os.getpid())[1],
    }


def _process_state(pid: int) -> tuple[str, str]:
    """State letter and start time of a process of this machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], fields[19]


def _is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended: one of this machine that is no more."""
    here = _this_process()
    if any(process.get(key) != here[key] for key in ("machine", "namespace")):
        return False
    try:
        state, started = _process_state(process["pid"])
    except (OSError, IndexError):
        return True
    return started != process["started"] or state in "ZX"


@dataclass(frozen=True)
class Attempt:
    """One claim of a run. Every rank holds it; only rank 0 writes events."""

    run_dir: Path
    number: int
    nonce: str  # in the claim and in every checkpoint: a run directory that was removed and made anew is another one
    accepts: dict[str, str]  # checkpoints of earlier attempts, with the sha256 of their manifests

    def check_current(self) -> None:
        """Raises :class:`Superseded` if a newer attempt has claimed the run, ``OSError`` if the claim is gone."""
        newest = max(_numbers(self.run_dir), default=0)
        if _path(self.run_dir, self.number + 1).exists():  # asked for by name: a list of names may be an old one
            newest = max(newest, self.number + 1)
        if newest > self.number:
            raise Superseded(
                f"run_dir {self.run_dir}: attempt {newest} has taken over from this one, attempt {self.number}"
            )
        if not self._is_mine():
            raise Superseded(f"run_dir {self.run_dir}: was removed and made anew by another run")

    def _is_mine(self) -> bool:
        """Raises ``OSError`` if the claim is gone."""
        with os.fdopen(os.open(_path(self.run_dir, self.number), os.O_RDONLY | os.O_NOFOLLOW)) as file:
            return f'"{self.nonce}"' in file.readline()

    def note(self, event: str, **fields: Any) -> None:
        """Append an event. Says nothing when that fails: whatever is decided by events must bear that one is missing."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with contextlib.suppress(OSError):
            if self._is_mine():
                with files.open_to_append(_path(self.run_dir, self.number), create=False) as file:
                    file.write(f"\n{line}\n")  # the line before may have been cut short

    def heartbeat(self) -> contextlib.AbstractContextManager[None]:
        """Show that this attempt is alive."""

        def beat() -> None:
            if self._is_mine():
                os.utime(_path(self.run_dir, self.number), follow_symlinks=False)

        return heartbeat(beat)


def claim(run_dir: Path, accepts: Callable[[dict[int, list[Event]]], dict[str, str]]) -> Attempt:
    """Claim a run for this process, which becomes its newest attempt.

    Args:
        accepts: from the events of all attempts so far, the checkpoints to believe.

    Raises:
        UserError: as :func:`check_free`.
    """
    while True:
        check_free(run_dir)
        number = max(_numbers(run_dir), default=0) + 1
        attempt = Attempt(run_dir, number, secrets.token_hex(8), accepts(attempts(run_dir)))
        event = {
            "event": "claim",
            "attempt": attempt.number,
            "nonce": attempt.nonce,
            "time": round(time.time(), 3),
            "version": __version__,
            "job": _job(),
            "launch": environment.LAUNCH.get(),
            "process": _this_process(),
            "accepts": attempt.accepts,
        }
        try:
            files.create(_path(run_dir, number), json.dumps(event) + "\n")
        except FileExistsError:
            continue  # somebody was faster: alive, or dead by now
        except OSError as error:
            raise UserError(f"run_dir {run_dir}: cannot be written: {error.strerror}") from None
        _clear_request(run_dir)
        return attempt


def _path(run_dir: Path, number: int) -> Path:
    return run_dir / ATTEMPTS / f"attempt-{number:08d}.jsonl"


def _clear_request(run_dir: Path) -> None:
    """Remove a request to stop that was meant for an earlier attempt: one older than the command that started this one."""
    started = environment.STARTED.get()
    if started is None:
        seconds = int(_process_state(os.getpid())[1]) / os.sysconf("SC_CLK_TCK")  # after the machine's start
        started = time.time() - float(Path("/proc/uptime").read_text().split()[0]) + seconds
    with contextlib.suppress(FileNotFoundError):
        if (run_dir / STOP_REQUESTED).lstat().st_mtime < started - 2:  # clocks of machines differ a little
            (run_dir / STOP_REQUESTED).unlink()
