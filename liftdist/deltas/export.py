"""Exports: a delta in the form that other software reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from liftdist import files
from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta
from liftdist.deltas.folder import disk_errors, rewrite
from liftdist.distributed.collectives import together
from liftdist.errors import UserError
from liftdist.models import check, weights
from liftdist.models.weights import ModelFolder

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")


def export_merged(delta: Delta, base: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the fine-tuned model as a Hugging Face folder, with config, tokenizer, generation config and chat template of
    the base; in ``dtype``, or as the base is. Collective where ranks run.

    Raises:
        UserError: ``target`` exists or cannot be written.
    """
    with together():
        stored = ModelFolder(base)

    def edit(name: str, tensor: Tensor) -> Tensor:
        tensor = deltas.edit(name, tensor, None, deltas.by_name(name, delta))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def finish(temporary: Path) -> None:
        for path in base.iterdir():
            if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name != check.INDEX:
                shutil.copyfile(path, temporary / path.name)
        if dtype is not None:
            config = json.loads((temporary / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)  # the older name of the same
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    rewrite(stored, target, edit, finish)


def export_shira(delta: Delta, base: Path, target: Path) -> None:
    """Write a SHiRA adapter that ``peft.PeftModel.from_pretrained`` loads. It holds differences in float32: they add up to
    the trained weights to within the rounding of float32 at the larger of old and new value, which in bf16 is exact but
    for weights that became thousands of times smaller.

    Raises:
        UserError: something else than weights of linear layers changed, or more of one than the format can hold.
    """
    changes = dict(deltas.changed(delta))
    for name, change in changes.items():
        if len(change.shape) != 2 or not name.endswith(".weight") or "embed" in name or change.base is None:
            raise UserError(
                f"{delta.origin}: a SHiRA adapter cannot hold {name} {list(change.shape)}: not a linear layer"
            )
    rank = max((-(-c.indices.numel() // sum(c.shape)) for c in changes.values()), default=1)  # one for all modules
    tensors = {}
    for name, change in changes.items():
        rows, columns = change.shape
        size = rank * (rows + columns)
        if size > rows * columns:
            raise UserError(
                f"{delta.origin}: a SHiRA adapter of rank {rank} is larger than {name} {list(change.shape)}"
            )
        padding = size - change.indices.numel()  # with differences of zero, at (0, 0)
        indices = torch.stack([change.indices // columns, change.indices % columns])
        difference = change.values.float() - (change.base.float() if change.base is not None else 0)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.shira_indices"] = nn.functional.pad(indices, (0, padding)).to(torch.int32)
        tensors[f"{module}.shira_weight"] = nn.functional.pad(difference, (0, padding))
    settings = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "mask_type": "principal_weights",
        "target_modules": [name.removesuffix(".weight") for name in changes],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    if target.exists():
        raise UserError(f"{target}: exists")
    with disk_errors(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            delta_file.save(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
            (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
            temporary.chmod(files.mode(0o777))
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def export_patch(delta: Delta, path: Path) -> None:
    """Write a sparse patch: for each tensor ``NAME.indices`` (flat, int32 or int64) and ``NAME.values``, which are absolute;
    the shapes are in the metadata."""
    tensors, shapes = {}, {}
    for name, change in deltas.changed(delta):
        size = int(torch.Size(change.shape).numel())
        tensors[f"{name}.indices"] = change.indices.to(torch.int32 if size < 2**31 else torch.int64)
        tensors[f"{name}.values"] = change.values
        shapes[name] = list(change.shape)
    delta_file.save(
        tensors, path, {"format": delta_file.PATCH_FORMAT, "base": delta.base, "shapes": json.dumps(shapes)}
    )


def export(
    delta: Delta, base: Path, target: Path, format: str, cache_dir: Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``delta`` as ``hf``, ``delta``, ``shira`` or ``patch``. Raises ``UserError`` unless ``base`` is its base model."""
    if weights.digest(base, cache_dir) != delta.base:
        raise UserError(f"{base}: is another model than the base of {delta.origin}")
    if format == "hf":
        export_merged(delta, base, target, dtype)
    elif format == "delta":
        delta_file.write(delta, target)
    elif format == "shira":
        export_shira(delta, base, target)
    else:
        export_patch(delta, target)
