"""Exports: a delta in the form that other software reads."""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist.deltas.delta import Delta
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.registry import EXPORT_FORMATS


def export(
    delta: Delta, base: Path, target: Path, format: str, cache_dir: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``delta`` in a format of :data:`liftdist.registry.EXPORT_FORMATS`.

    Args:
        dtype: of a whole model; that of its base by default.

    Raises:
        UserError: an unknown format; ``base`` is not the base model; ``target`` exists or cannot be written.
    """
    write = EXPORT_FORMATS.load(format).write
    if weights.digest(base, cache_dir) != delta.base:
        raise UserError(f"{base}: is another model than the base of {delta.origin}; --base must name that")
    write(delta, base, target, dtype)
