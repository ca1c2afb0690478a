"""Export of a delta to formats that other software reads."""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist.deltas.delta import Delta
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.registry import EXPORT_FORMATS


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
    if weights.digest(base_folder, cache_dir) != delta.base_digest:
        raise UserError(f"{base_folder}: is not the base model of {delta.location}; --base must name its folder")
    write(delta, base_folder, target, dtype)
