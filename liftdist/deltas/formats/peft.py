"""The adapters of a LoRA run, as peft saves them.

base_model.model.MODULE.lora_A.weight    [r, n]        base_model.model.MODULE.lora_magnitude_vector   [m], of DoRA
base_model.model.MODULE.lora_B.weight    [m, r]        adapter_config.json
                                         with EVA r, rank_pattern in adapter_config.json, differs from module to module
base_model.model.MODULE.miss_block       of MiSS       base_model.model.MODULE.shira_weight, shira_indices            of SHiRA
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liftdist import files
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta
from liftdist.errors import UserError
from liftdist.method_settings import EvaConfig
from liftdist.models import adapters


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
    ranks, given = held.ranks, held.settings
    patterns: dict[str, Any] = {}
    kept = [module for module in held.modules if ranks.get(module, 1)]
    if ranks:  # the scale is the same for all
        given = replace(given, variant="lora", eva=EvaConfig())
        others = {module: rank for module, rank in ranks.items() if rank not in (0, given.rank)}
        alphas = {module: given.alpha * rank / given.rank for module, rank in others.items()}
        patterns = {"rank_pattern": others, "alpha_pattern": alphas}
    config = adapters.peft_config(
        given,
        adapters.targets(kept, held.base),
        **patterns,
        task_type="CAUSAL_LM",
        base_model_name_or_path=delta.origin.get("base_model", str(base_folder)),
        revision=delta.origin.get("base_commit"),
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{module}.{key}": tensor.contiguous()
        for module in kept
        for key, tensor in _of_rank(held.read(module), ranks.get(module)).items()
    }
    if target.exists():
        raise UserError(f"{target}: exists; remove it or give another path")
    with files.disk_errors(target), files.new_folder(target) as folder:
        delta_file.save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(folder))
        delta.write_about(folder)


def _of_rank(values: dict[str, torch.Tensor], rank: int | None) -> dict[str, torch.Tensor]:
    """The tensors of a module's LoRA without those of higher ranks, if there is one."""
    if rank is None:
        return values
    return {"lora_A.weight": values["lora_A.weight"][:rank], "lora_B.weight": values["lora_B.weight"][:, :rank]}
