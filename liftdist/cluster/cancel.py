"""``liftdist cancel``: every job of a run ends, those that train after they have saved.

    running: a request to stop -> saved and ended, or the time for that is over -> scancel        all others: scancel

SLURM may not answer for a while; the request to stop needs none of it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from liftdist import files
from liftdist.cluster import commands, history, job, scheduler
from liftdist.cluster.scheduler import Job
from liftdist.errors import UserError
from liftdist.runs import layout
from liftdist.slurm_settings import SlurmConfig

_POLL = 2.0  # seconds between two looks
_SILENCE = 600.0  # seconds for which SLURM may give no answer
_ENDING = 240.0  # seconds that SLURM has to end a job: KillWait, what its nodes do afterwards, and some more
_REPEAT = 60.0  # seconds after which scancel is called again
INTERRUPTED = 130  # exit code after Ctrl-C


def cancel(folder: Path, now: bool) -> None:
    """End the jobs of a run, or of the runs of an array.

    Args:
        now: do not let them save, and do not wait for their end.

    Raises:
        UserError: no job is known; a job does not end; SLURM may not be told so.
        NoAnswer: SLURM has not answered for ten minutes.
    """
    cancelling = _Cancelling(_run_dirs(folder), now)
    try:
        while cancelling.step():
            time.sleep(_POLL)
    except KeyboardInterrupt:
        print(f"liftdist: {cancelling.rest()}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if not cancelling.seen:
        print("nothing is queued or running")


def _run_dirs(folder: Path) -> dict[str, Path]:
    """The jobs, each with its run directory. Raises ``UserError``: there is none."""
    if (folder / history.JOBS).is_file():
        found = dict.fromkeys(history.job_ids(folder), folder)
        return found | {id: run_dir for run_dir in history.runs(folder) for id in history.job_ids(run_dir)}
    # the folder is gone, or was never written to: the command of a job names the config that was kept there
    id = commands.find(f"{folder.absolute() / layout.LOGS / job.SUBMITTED}-")
    if id is None:
        raise UserError(f"{folder}: no job was submitted for it; `squeue --me` lists your jobs, `scancel JOB` ends one")
    return {id: folder}


class _Cancelling:
    def __init__(self, run_dirs: Mapping[str, Path], now: bool) -> None:
        self.seen = False  # a job that had not ended
        self._run_dirs = run_dirs  # by job
        self._now = now
        self._saving: dict[str, float] = {}  # by job: when its time to save is over
        self._cancelled: dict[str, float] = {}  # by job: when scancel was called first
        self._called = 0.0  # when scancel was called last
        self._heard = time.monotonic()  # when SLURM answered last
        self._requested = False  # without knowing what runs

    def step(self) -> bool:
        """Do what can be done now; whether something remains."""
        try:
            living = [found for found in scheduler.jobs(self._run_dirs, patience=0) if not found.has_ended]
            self._announce_ends({found.id for found in living})
            self._treat(living)
            self._heard = time.monotonic()
        except commands.NoAnswer as error:
            if time.monotonic() - self._heard > _SILENCE:
                raise commands.NoAnswer(f"{error}; {self.rest()}") from None
            if not self._now and not self._requested:
                self._request_blindly()
            return True
        return bool(living) and not self._now

    def rest(self) -> str:
        """What an interrupted `cancel` leaves undone."""
        if self._cancelled:
            return f"SLURM ends job {', '.join(self._cancelled)}; `liftdist status` shows whether it has"
        if self._saving or self._requested:
            which = f"job {', '.join(self._saving)}" if self._saving else "what runs"
            return f"{which} still saves and ends by itself; `liftdist cancel` waits again, with --now it ends at once"
        return "nothing was cancelled; the same command tries again"

    def _treat(self, living: Sequence[Job]) -> None:
        ids = []
        for found in reversed(living):  # those that wait for others first
            self.seen = True
            if found.state == "RUNNING" and not self._now and found.id not in self._cancelled:
                if found.id not in self._saving:
                    self._request(found)
                if time.monotonic() < self._saving[found.id]:
                    continue
                print(f"job {found.id} has not ended in that time")
            ids.append(found.id)
            since = self._cancelled.get(found.id)
            if since is not None and time.monotonic() - since > _ENDING:
                raise UserError(
                    f"job {found.id}: still {found.state} on {found.nodes or 'no node'}, {_ENDING:.0f} s after scancel; "
                    "SLURM tries on, its administrators can end it"
                )
        if new := [id for id in ids if id not in self._cancelled]:
            self._scancel(new)
        elif ids and time.monotonic() - self._called > _REPEAT:
            self._scancel(ids)

    def _scancel(self, ids: Sequence[str]) -> None:
        done = commands.ask(["scancel", *ids])
        self._called = time.monotonic()
        ended = r"already complet|Invalid job id|already finished"
        if done.returncode and not re.search(ended, done.stderr):
            raise UserError(f"scancel {' '.join(ids)}: {commands.reason(done)}")
        for id in ids:
            if id not in self._cancelled:
                self._cancelled[id] = self._called
                print(f"job {id} is cancelled", flush=True)

    def _announce_ends(self, living: set[str]) -> None:
        for id in [id for id in self._saving if id not in living]:
            del self._saving[id]
            print(f"job {id} has ended", flush=True)

    def _request(self, found: Job) -> None:
        """Have a running job save and end."""
        run_dir = self._run_dirs.get(found.id) or self._run_dirs[found.id.partition("_")[0]]
        lead = _time_to_save(run_dir)
        try:
            request_stop(run_dir)
        except UserError as error:  # a full disk, another user's folder, or none: ranks hear signals, too
            print(f"liftdist: {error}; the job is sent a signal instead", file=sys.stderr)
            done = commands.ask(["scancel", "--signal=USR2", found.id])
            if done.returncode:
                print(f"liftdist: scancel --signal=USR2 {found.id}: {commands.reason(done)}", file=sys.stderr)
                lead = 0
        self._saving[found.id] = time.monotonic() + lead
        print(f"job {found.id} saves and ends, or is cancelled after {lead:.0f} s; --now ends it at once", flush=True)

    def _request_blindly(self) -> None:
        """Have whatever runs save and end. Where nothing runs, the request is void: the next start is younger."""
        self._requested = True
        print(
            "liftdist: SLURM does not answer; the run is asked to save and end meanwhile", file=sys.stderr, flush=True
        )
        for run_dir in set(self._run_dirs.values()):
            with contextlib.suppress(UserError):
                request_stop(run_dir)


def request_stop(run_dir: Path) -> None:
    """Raises ``UserError``: the run directory is missing, or cannot be written to."""
    try:
        files.write(run_dir / layout.STOP_REQUESTED, "")
    except OSError as error:
        raise UserError(files.reason(error)) from None


def _time_to_save(run_dir: Path) -> float:
    """Seconds for a step and a save: those that the run has before its time limit, too."""
    try:
        lead = yaml.safe_load(files.read(run_dir / "config.yaml"))["slurm"]["signal_lead"]
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        lead = None
    return lead if isinstance(lead, int) else SlurmConfig().signal_lead
