"""Launching: torchrun command lines on one or many machines, and SLURM jobs with their decisions.

In: a validated config, options, ``SLURM_*``. Out: processes, job scripts' decisions, ``jobs.jsonl``. Imports no torch
at import, so that ``liftdist submit`` and a job's own checks start at once. Must not know what a run computes: it
decides by what the run directory holds.
"""
