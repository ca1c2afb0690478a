"""A sparse patch: flat indices and absolute values of each tensor that changed.

NAME.indices   [k] int32 or int64, flat        NAME.values   [k]        metadata: format, digest of the base, shapes
"""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist.console import Console
from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a sparse patch. Raises ``UserError`` if a value is not finite or ``target`` cannot be written."""
    tensors, shapes = {}, {}
    rounded: set[tuple[torch.dtype, torch.dtype]] = set()
    for name, change in deltas.changed(delta):
        size = int(torch.Size(change.shape).numel())
        tensors[f"{name}.indices"] = change.indices.to(torch.int32 if size < 2**31 else torch.int64)
        tensors[f"{name}.values"] = change.values
        shapes[name] = list(change.shape)
        if deltas.loses(change.values, change.stored):
            rounded.add((change.dtype, change.stored))
    metadata = {"format": delta_file.PATCH_FORMAT, "base": delta.base_digest, "shapes": shapes}
    delta_file.save(tensors, target, delta.about() | metadata)
    for values, stored in sorted(rounded, key=str):
        Console(enabled=True).say(
            f"{target}: holds {values} for weights that the base has in {stored}: a server that keeps them so rounds, and undoes "
            f"most changes; start it in {values}"
        )
