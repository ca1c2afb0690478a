"""Export of a delta to formats that other software reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from liftdist.deltas import file as delta_file
from liftdist.deltas import of_run
from liftdist.deltas.delta import ORIGIN, Delta
from liftdist.deltas.difference import on
from liftdist.errors import UserError
from liftdist.models import hub, weights
from liftdist.registry import EXPORT_FORMATS


def read(
    source: Path, step: int | None, base: str | None, say: Callable[[str], None]
) -> tuple[Delta, Path, torch.dtype | None]:
    """The delta of a run directory or in a file, the folder of its base model, and of a run the dtype it was trained in.

    Args:
        step: of a run, the checkpoint of this step; the newest by default.
        base: the base model, as a folder or ``NAME[@REVISION]`` on the hub; by default where the run found it.

    Raises:
        UserError: no such run, checkpoint, delta or base model, or a damaged one.
    """
    check_step(source, step)
    folder, repo = hub.model_of(base, "--base") if base else (None, None)
    if source.is_file():
        if folder is None:
            raise UserError(f"{source}: --base must name its base model: a folder, or NAME@REVISION on the hub")
        made, found, dtype = delta_file.read(source), folder, None
    else:
        made, found, dtype = of_run.of_run_dir(source, step, folder, say)
    if repo is not None and (commit := repo.commit()) is not None:
        made = replace(made, origin=dict(zip(ORIGIN, (repo.name, commit), strict=True)))
    return made, found, dtype


def check_step(source: Path, step: int | None) -> None:
    """Raises ``UserError`` if a step is asked for of what is no run."""
    if step is not None and source.is_file():
        raise UserError(f"--step {step}: {source} is a delta, which is of one step; leave it out")


def export(
    delta: Delta, base_folder: Path, target: Path, format: str, cache_dir: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``delta`` in a format of :data:`liftdist.registry.EXPORT_FORMATS`.

    Args:
        dtype: of an exported model; that of its base by default.

    Raises:
        UserError: an unknown format; ``base_folder`` is not the base model; ``target`` exists or cannot be written.
    """
    write = EXPORT_FORMATS.load(format).write
    if delta.adapters is not None and format not in ("hf", "peft"):
        raise UserError(
            f"--format {format}: holds changed weights one by one, and adapters change all of their modules; use --format peft "
            f"for the adapters, or hf for the model that they are merged into"
        )
    check_base(base_folder, delta, cache_dir)
    write(on(delta, weights.ModelFolder(base_folder)), base_folder, target, dtype)


def check_base(folder: Path, delta: Delta, cache_dir: Path) -> None:
    """Raises ``UserError`` unless ``folder`` is the base model of ``delta``."""
    if weights.digest(folder, cache_dir) != delta.base_digest:
        raise UserError(f"{folder}: is not the base model of {delta.location}; --base must name its folder")
