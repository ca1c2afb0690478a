"""What the jobs of a run did and why, one line an event; and whether a job may be requeued once more. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liftdist import environment, files
from liftdist.runs import claims
from liftdist.schema import Config

JOBS = "jobs.jsonl"  # in the run directory
PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time limit", "node failure"  # causes to requeue a job
CAUSES = (PREEMPTED, TIME_LIMIT, NODE_FAILURE)
ASKED = "asked to stop"  # the cause of an end that is no failure

Event = dict[str, Any]


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """Append an event to the history."""
    with files.open_to_append(run_dir / JOBS) as file:
        file.write(f"\n{json.dumps({'event': event, 'time': round(time.time(), 3), **fields})}\n")


def read(run_dir: Path) -> list[Event]:
    """All events so far; lines that were cut short are left out."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for line in files.read(run_dir / JOBS).splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def committed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that was committed, 0 before the first."""
    events = itertools.chain.from_iterable(claims.attempts(run_dir).values())
    return max((event["step"] for event in events if event.get("event") == "commit"), default=0)


def this_start() -> dict[str, Any]:
    job, start = environment.this_job()
    # the family: this job and those it was submitted again as
    return {"job": job, "start": start, "family": os.environ.get("LIFTDIST_FIRST_JOB", job)}


def start_name(event: Event) -> str:
    """The name of the start of a job that an event is about."""
    return environment.start_name(event["job"], event["start"])


def refusal(config: Config, events: Sequence[Event], family: str, cause: str, step: int) -> str | None:
    """Why a job may not be requeued for ``cause`` once more: its budget is spent, or nothing was gained since the last time."""
    ends = [e for e in events if e["event"] == "end" and e["family"] == family and e["cause"] in CAUSES]
    before = [event for event in ends if event["action"] in ("requeue", "nothing")]  # by itself, or by SLURM
    if len(before) >= config.slurm.max_requeues:
        return f"requeued {len(before)} times, as often as slurm.max_requeues allows"
    alike = [event for event in before if event["cause"] == cause]
    if alike and step <= alike[-1]["step"]:
        return f"no step was saved since it was last requeued for this, at step {alike[-1]['step']}"
    return None
