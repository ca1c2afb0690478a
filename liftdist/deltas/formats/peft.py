"""The adapters of a LoRA run, as peft saves them.

base_model.model.MODULE.lora_A.weight    [r, n]        base_model.model.MODULE.lora_magnitude_vector   [m], of DoRA
base_model.model.MODULE.lora_B.weight    [m, r]        adapter_config.json
"""

from __future__ import annotations

from pathlib import Path

import torch

from liftdist import files
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta
from liftdist.deltas.folder import disk_errors
from liftdist.errors import UserError
from liftdist.models import adapters
from liftdist.models.build import build, check_type
from liftdist.schema import ModelConfig


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads onto the base model: in float32, PiSSA as LoRA of twice the
    rank, see :mod:`liftdist.deltas.adapter`.

    Raises:
        UserError: the run has no adapters, or ``target`` exists or cannot be written.
    """
    if (held := delta.adapters) is None:
        raise UserError(
            f"{delta.location}: holds no adapters, which --format peft writes; use --format shira, hf or delta"
        )
    model = ModelConfig(path=str(base_folder), trust_remote_code=held.trust_remote_code)
    targets = adapters.targets(held.modules, build(check_type(base_folder, model), model))
    config = adapters.peft_config(
        held.settings,
        targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=delta.origin.get("base_model", str(base_folder)),
        revision=delta.origin.get("base_commit"),
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{module}.{key}": tensor.contiguous()
        for module in held.modules
        for key, tensor in held.read(module).items()
    }
    if target.exists():
        raise UserError(f"{target}: exists; remove it or give another path")
    with disk_errors(target), files.new_folder(target) as folder:
        delta_file.save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))
