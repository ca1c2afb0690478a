"""Environment variables that mean something."""

from __future__ import annotations

import os
from collections.abc import Mapping


def slurm_start(environ: Mapping[str, str]) -> str:
    """Which start of its SLURM job a process belongs to: how often that was requeued and, then, restarted: ``2.0``."""
    return f"{environ.get('SLURM_RESTART_COUNT', '0')}.{environ.get('LIFTDIST_TRY', '0')}"


def this_job(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The SLURM job of this process, an array task as ``12_3``; and its start: how often it was requeued, then restarted."""
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return job, slurm_start(environ)


def start_name(job: str, start: str) -> str:
    """The name of one start of a job: of its folder of logs, and of its rendezvous."""
    return f"{job}-{start}"
