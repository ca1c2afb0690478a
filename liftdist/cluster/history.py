"""What the jobs of a run did and why, one line an event; and whether a job may be requeued once more. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liftdist import environment, files
from liftdist.errors import UserError
from liftdist.runs import claims
from liftdist.schema import Config

JOBS = "jobs.jsonl"  # in the run directory
PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time limit", "node failure"  # causes to requeue a job
CAUSES = (PREEMPTED, TIME_LIMIT, NODE_FAILURE)
ASKED = "asked to stop"  # the cause of an end that is no failure

Event = dict[str, Any]

_Kinds = type | tuple[type, ...]
_OF_ALL: dict[str, _Kinds] = {"job": str, "time": (int, float)}
_OF_A_START: dict[str, _Kinds] = _OF_ALL | {"start": str, "family": str, "step": int}
#: What readers rely on in the events of each kind.
_FIELDS: dict[str, dict[str, _Kinds]] = {
    "submit": _OF_ALL | {"log": str},
    "start": _OF_A_START | {"nodes": list, "log": (str, type(None))},
    "end": _OF_A_START | {"action": str, "cause": (str, type(None)), "message": str},
}


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """Append an event to the history. Raises ``UserError`` where that cannot be written."""
    try:
        with files.open_to_append(run_dir / JOBS) as file:
            file.write(f"\n{json.dumps({'event': event, 'time': round(time.time(), 3), **fields})}\n")
    except OSError as error:
        raise UserError(files.reason(error)) from None


def read(run_dir: Path) -> list[Event]:
    """All events so far. Lines that were cut short, or lack what events of their kind have, are left out.

    Raises:
        UserError: the history is there, and cannot be read.
    """
    try:
        with files.open_to_read(run_dir / JOBS) as file:
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(files.reason(error)) from None
    events = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if _is_whole(event):
                events.append(event)
    return events


def _is_whole(event: object) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    fields = _FIELDS.get(event["event"])
    if fields is None or not all(name in event and isinstance(event[name], kinds) for name, kinds in fields.items()):
        return False
    if not re.fullmatch(r"\d+(_\d+)?", event["job"], re.ASCII) or not 0 <= event["time"] < 1 << 40:
        return False
    return all(isinstance(node, str) for key in ("nodes", "exclude") for node in event.get(key) or ())


def job_ids(run_dir: Path) -> list[str]:
    """The jobs of a run, from their own events and those of `submit`; the newest last."""
    return list(dict.fromkeys(event["job"] for event in read(run_dir)))


def runs(folder: Path) -> list[Path]:
    """The run directory, or those of an array below it. Raises ``UserError``: no job has worked there."""
    if not (folder / JOBS).is_file():
        raise UserError(f"{folder}: no job was submitted for it")
    below = [path.parent for path in folder.glob(f"*/{JOBS}") if not path.parent.is_symlink()]
    return sorted(below, key=lambda path: (len(path.name.partition("-")[0]), path.name)) or [folder]


def committed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that was committed, 0 before the first."""
    events = itertools.chain.from_iterable(claims.attempts(run_dir).values())
    commits = (event for event in events if isinstance(event, dict) and event.get("event") == "commit")
    return max((event["step"] for event in commits if isinstance(event.get("step"), int)), default=0)


def this_start() -> dict[str, Any]:
    job, start = environment.this_job()
    # the family: this job and those it was submitted again as
    return {"job": job, "start": start, "family": environment.FIRST_JOB.get(job)}


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
