"""Attempts: which process may write into a run directory, and which checkpoints are valid.

    attempts/attempt-00000003.jsonl     one event per line, written by rank 0 of the third attempt at this run:
        {"event": "claim", "nonce": ..., "job": ..., "process": ..., "accepts": {"step-00000100": sha256 of its manifest, ...}}
        {"event": "commit", "step": 200, ...}   {"event": "end", "outcome": "stopped", ...}

An attempt claims the run by creating its file exclusively. The mtime of the file is its heartbeat: while it is fresh and the
attempt has not ended, no other process may claim the run. Only checkpoints that the newest attempt has accepted or written are
valid, so what a rank left over from an older attempt still writes is ignored.

Imports no torch: the launcher checks that a run directory is free before it starts ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liftdist import __version__, environment, files
from liftdist.errors import UserError
from liftdist.heartbeat import heartbeat
from liftdist.processes import has_ended, start_time, this_process
from liftdist.runs import results
from liftdist.runs.layout import ATTEMPTS, CHECKPOINTS, LOGS, STOP_REQUESTED, TENSORBOARD, TRACKERS

LEASE = 90.0  # seconds without a heartbeat after which an attempt is dead; network file systems cache mtimes up to 60 s

Event = dict[str, Any]


class Superseded(UserError):
    """A newer attempt has claimed the run: this one must stop, and may no longer write."""


def attempts(run_dir: Path) -> dict[int, list[Event]]:
    """The events of every attempt, by number. Truncated lines after the first are skipped.

    Raises:
        UserError: a file is damaged or cannot be read: the checkpoints it records must not be treated as absent.
    """
    found: dict[int, list[Event]] = {}
    for number in _numbers(run_dir):
        path = path_of(run_dir, number)
        try:
            first, *others = files.read(path).splitlines() or [""]
            claim = json.loads(first)
            if claim["event"] != "claim" or claim["attempt"] != number:
                raise ValueError("its first line is not the claim of this attempt")
        except OSError as error:
            raise UserError(files.reason(error)) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: {error}; --fresh starts again in a new directory") from None
        found[number] = [claim]
        for line in others:
            with contextlib.suppress(ValueError):
                found[number].append(json.loads(line))
    return found


def identity(run_dir: Path) -> str | None:
    """What all attempts at a run have in common, and no other run has; None before the first. Raises ``UserError``."""
    history = attempts(run_dir)
    first: str | None = history[min(history)][0]["nonce"] if history else None
    return first


def exported(folder: Path) -> int | None:
    """The step whose model a folder of a run directory is, by the run's own record; None if it is none. Raises ``UserError``."""
    events = [event for events in attempts(folder.parent).values() for event in events if event["event"] == "export"]
    steps: list[int] = [event["step"] for event in events if event.get("folder", "export") == folder.name]
    return steps[-1] if steps and folder.is_dir() else None


def _numbers(run_dir: Path) -> list[int]:
    """The numbers of the attempts whose files exist, ascending."""
    names = [path.stem.removeprefix("attempt-") for path in (run_dir / ATTEMPTS).glob("attempt-*.jsonl")]
    return sorted(int(name) for name in names if name.isdigit())


def check_free(run_dir: Path) -> None:
    """Check that this process may claim ``run_dir``; create it if needed.

    Raises:
        UserError: it holds other contents than a run, another process uses it, or it cannot be written.
    """
    try:
        is_known = run_dir.is_dir() and (
            (run_dir / ATTEMPTS).is_dir() or results.are_alone(run_dir) or not any(run_dir.iterdir())
        )
        if run_dir.exists() and not is_known:
            raise UserError(f"run_dir {run_dir}: exists and holds no run; give another one (run_dir=...)")
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (ATTEMPTS, CHECKPOINTS, TENSORBOARD, LOGS, TRACKERS):
            files.check_real_folder(run_dir / name)
        _check_writable(run_dir)
        files.real_folder(run_dir / ATTEMPTS)
        with tempfile.TemporaryFile(dir=run_dir / ATTEMPTS) as file:
            now = os.fstat(file.fileno()).st_mtime  # the file system's clock, as for heartbeats
        history = attempts(run_dir)
        if history:
            newest = max(history)
            _check_dead(run_dir, path_of(run_dir, newest), history[newest], now)
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir}: cannot be written: {error.strerror}; give a writable folder (run_dir=...)"
        ) from None


def _check_writable(run_dir: Path) -> None:
    """Raises ``UserError`` if another user began the run, and this one may not go on writing what they wrote."""
    folders = [run_dir, *(run_dir / name for name in (ATTEMPTS, CHECKPOINTS, TENSORBOARD, LOGS, TRACKERS))]
    appended = [run_dir / "command.txt", *run_dir.glob("*.jsonl")]
    checkpoints = (run_dir / CHECKPOINTS).glob("step-*")  # old ones are removed
    if problem := files.not_writable(path for path in (*folders, *appended, *checkpoints) if path.exists()):
        raise UserError(
            f"run_dir {run_dir}: {problem}: a run that a group shares needs umask 002 and a folder with the setgid bit from "
            "its start; ask its owner for chmod -R g+rwX, or start your own (run_dir=...)"
        )


def _check_dead(run_dir: Path, path: Path, events: list[Event], now: float) -> None:
    claim, process = events[0], events[0]["process"]
    if is_over(path, events, now) or _is_earlier(claim["job"], claim.get("launch")):
        return
    silent = now - path.stat().st_mtime
    name = f"job {claim['job']['id']}, " if claim["job"] else ""
    raise UserError(
        f"run_dir {run_dir}: in use by {name}process {process['pid']} on {process['host']} (attempt {claim['attempt']}, "
        f"last heartbeat {max(silent, 0):.0f} s ago); stop it first, or, if it is dead, wait until {LEASE:.0f} s after that"
    )


def _job() -> dict[str, str] | None:
    """The SLURM job of this process, and the time of its start: a requeued job starts again."""
    job = environment.SLURM_JOB_ID.get()
    return None if job is None else {"id": f"slurm {job}", "time": environment.slurm_start()}


def _is_earlier(job: Mapping[str, str] | None, launch: str | None) -> bool:
    """Whether a claim was made by an earlier start of this job, or by ranks of this start that were restarted since."""
    mine = _job()
    if launch is not None and launch == environment.LAUNCH.get():
        return environment.AGENT_RESTARTS.get(0) > 0  # torchrun ends all ranks before it restarts them
    if mine is None or job is None:
        return False
    if mine["id"] == job["id"]:
        return mine["time"] != job["time"]  # requeued, or restarted by its batch script
    return job["id"] == f"slurm {environment.AFTER_JOB.get()}"  # this job was submitted to follow that one


def is_over(path: Path, events: Sequence[Event], now: float) -> bool:
    """Whether an attempt has ended, or is dead as far as this machine knows.

    Args:
        path: its file, whose mtime is its heartbeat.
        events: the claim, and what followed it.
        now: seconds since the epoch, by the clock of its file system.
    """
    ended = any(event.get("event") == "end" for event in events)
    return ended or now - path.stat().st_mtime > LEASE or has_ended(events[0]["process"])


@dataclass(frozen=True)
class Attempt:
    """One claim of a run. Every rank holds it; only rank 0 writes events."""

    run_dir: Path
    number: int
    nonce: str  # in the claim and in every checkpoint: detects a run directory that was deleted and created again
    accepts: dict[str, str]  # checkpoints of earlier attempts, with the sha256 of their manifests

    def check_current(self) -> None:
        """Raises :class:`Superseded` if a newer attempt has claimed the run, ``OSError`` if the claim is gone."""
        newest = max(_numbers(self.run_dir), default=0)
        if path_of(self.run_dir, self.number + 1).exists():  # a cached directory listing may be stale
            newest = max(newest, self.number + 1)
        if newest > self.number:
            raise Superseded(
                f"run_dir {self.run_dir}: attempt {newest} has taken over from this one, attempt {self.number}"
            )
        if not self._is_mine():
            raise Superseded(f"run_dir {self.run_dir}: was deleted and created again by another run")

    def _is_mine(self) -> bool:
        """Raises ``OSError`` if the claim is gone."""
        with os.fdopen(os.open(path_of(self.run_dir, self.number), os.O_RDONLY | os.O_NOFOLLOW)) as file:
            return f'"{self.nonce}"' in file.readline()

    def note(self, event: str, **fields: Any) -> None:
        """Append an event. Ignores failures: decisions based on events must allow for a missing one."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with contextlib.suppress(OSError):
            if self._is_mine():
                with files.open_to_append(path_of(self.run_dir, self.number), create=False) as file:
                    file.write(f"\n{line}\n")  # the previous line may be truncated

    def heartbeat(self) -> contextlib.AbstractContextManager[None]:
        """Touch the claim regularly while the block runs."""

        def beat() -> None:
            if self._is_mine():
                os.utime(path_of(self.run_dir, self.number), follow_symlinks=False)

        return heartbeat(beat)


def claim(run_dir: Path, accepts: Callable[[dict[int, list[Event]]], dict[str, str]]) -> Attempt:
    """Claim a run for this process, which becomes its newest attempt.

    Args:
        accepts: returns the valid checkpoints, from the events of all attempts so far; see :attr:`Attempt.accepts`.

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
            "process": this_process(),
            "accepts": attempt.accepts,
        }
        try:
            files.create(path_of(run_dir, number), json.dumps(event) + "\n")
        except FileExistsError:
            continue  # another process was first; it may be alive, or dead by now
        except OSError as error:
            raise UserError(
                f"run_dir {run_dir}: cannot be written: {error.strerror}; give a writable folder (run_dir=...)"
            ) from None
        _clear_request(run_dir)
        return attempt


def path_of(run_dir: Path, number: int) -> Path:
    """The file of an attempt."""
    return run_dir / ATTEMPTS / f"attempt-{number:08d}.jsonl"


def _clear_request(run_dir: Path) -> None:
    """Remove a stop request that is older than the command that started this attempt: it was for an earlier one."""
    started = environment.STARTED.get()
    if started is None:
        started = start_time()
    with contextlib.suppress(FileNotFoundError):
        if (run_dir / STOP_REQUESTED).lstat().st_mtime < started - 2:  # clocks of machines differ slightly
            (run_dir / STOP_REQUESTED).unlink()
