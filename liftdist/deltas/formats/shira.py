"""A SHiRA adapter for peft.

base_model.model.MODULE.shira_weight    [k] float32    differences
base_model.model.MODULE.shira_indices   [2, k] int32   row, column
adapter_config.json                                    one rank r for all modules: k = r (m + n)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from liftdist import files
from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, Delta
from liftdist.errors import UserError
from liftdist.models import names


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads, on the model that transformers loads from
    ``base_folder``.

    It holds differences in float32: base plus difference is the trained weight to within float32 rounding at the larger of old
    and new value, which in bf16 is exact except for weights that became thousands of times smaller.

    Raises:
        UserError: other tensors than weights of linear layers changed, one has more changes than the format can hold, or the
            delta holds no base values.
    """
    changes = dict(deltas.changed(delta))
    modules = _modules(delta, changes, base_folder)
    rank = max((-(-c.indices.numel() // sum(c.shape)) for c in changes.values()), default=1)  # one for all modules
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        tensors |= _entries(delta, change, rank, f"base_model.model.{modules[name]}")
    settings = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": delta.origin.get("base_model", str(base_folder)),
        "revision": delta.origin.get("base_commit"),
        "r": rank,
        "mask_type": "principal_weights",
        "target_modules": list(modules.values()),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if target.exists():
        raise UserError(f"{target}: exists; remove it or give another path")
    with files.disk_errors(target), files.new_folder(target) as folder:
        delta_file.save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        delta.write_about(folder)


def _modules(delta: Delta, changes: Mapping[str, Change], base_folder: Path) -> dict[str, str]:
    """The linear module that holds each changed tensor in the model, by the tensor's name in the files."""
    parameter = names.of_folder(base_folder).parameter
    found = {}
    for name, change in changes.items():
        own = parameter.get(name, "")
        if len(change.shape) != 2 or not own.endswith(".weight") or "embed" in own:
            raise UserError(
                f"{delta.location}: a SHiRA adapter cannot hold {name} {list(change.shape)}, which is not the weight of a "
                "linear layer; use --format hf or delta"
            )
        found[name] = own.removesuffix(".weight")
    return found


def _entries(delta: Delta, change: Change, rank: int, module: str) -> dict[str, Tensor]:
    """The tensors of one module: differences and their indices, padded to the number of entries that ``rank`` gives."""
    rows, columns = change.shape
    size = rank * (rows + columns)
    if size > rows * columns:
        raise UserError(
            f"{delta.location}: a SHiRA adapter of rank {rank} is larger than {module} {list(change.shape)}"
        )
    if change.base is None:
        raise UserError(
            f"{delta.location}: holds no base values, from which a SHiRA adapter is computed; use --format patch"
        )
    padding = size - change.indices.numel()  # zero differences at (0, 0)
    indices = torch.stack([change.indices // columns, change.indices % columns])
    difference = change.values.float() - change.base.float()
    return {
        f"{module}.shira_indices": nn.functional.pad(indices, (0, padding)).to(torch.int32),
        f"{module}.shira_weight": nn.functional.pad(difference, (0, padding)),
    }
