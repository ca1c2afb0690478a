"""Names of files and folders in a run directory, and of run directories."""

from __future__ import annotations

from pathlib import Path

from liftdist import files
from liftdist.errors import UserError

ATTEMPTS, CHECKPOINTS, TENSORBOARD, LOGS = "attempts", "checkpoints", "tensorboard", "logs"  # folders
TRACKERS = "trackers"  # a folder, where clients of trackers are used
METRICS = "metrics.jsonl"  # a line for each step that is recorded
MANIFEST = "manifest.json"  # of a checkpoint
LACKED_MEMORY = "lacked-memory.json"  # the last choice of train.fit_memory that did not fit
STOP_REQUESTED = "stop-requested"  # a file that requests a stop


def check_run(folder: Path) -> None:
    """Raises ``UserError`` unless ``folder`` is a run directory."""
    if not folder.exists():
        raise UserError(f"{folder}: no such run directory")
    if not (folder / ATTEMPTS).is_dir():
        raise UserError(f"{folder}: is not a run directory (it has no {ATTEMPTS}/)")


def logs(run_dir: Path, start: str) -> Path:
    """The folder for the logs of nodes and ranks of one start of a job, ``logs/START``; created if needed."""
    return files.real_folder(files.real_folder(run_dir / LOGS) / start)


def next_free(run_dir: Path) -> Path:
    """The first of ``run_dir``, ``run_dir-2``, ``run_dir-3``, ... that does not exist, or is empty."""
    number, candidate = 1, run_dir
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    return candidate
