"""A sparse patch: flat indices and absolute values of each tensor that changed.

NAME.indices   [k] int32 or int64, flat        NAME.values   [k]        metadata: format, digest of the base, shapes
"""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a sparse patch. Raises ``UserError`` if a value is not finite or ``target`` cannot be written."""
    tensors, shapes = {}, {}
    for name, change in deltas.changed(delta):
        size = int(torch.Size(change.shape).numel())
        tensors[f"{name}.indices"] = change.indices.to(torch.int32 if size < 2**31 else torch.int64)
        tensors[f"{name}.values"] = change.values
        shapes[name] = list(change.shape)
    metadata = {"format": delta_file.PATCH_FORMAT, "base": delta.base_digest, "shapes": shapes}
    delta_file.save(tensors, target, delta.about() | metadata)
