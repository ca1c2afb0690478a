"""A delta file: changed weights and their base values, see :mod:`liftdist.deltas.delta`."""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``delta`` with its base values. Raises ``UserError`` if a value is not finite or ``target`` cannot be written."""
    delta_file.write(delta, target)
