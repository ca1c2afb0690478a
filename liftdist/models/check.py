"""Checks of a model folder before weights are read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liftdist.errors import UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def check_model_folder(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        UserError: it is absent or damaged, the model type is unknown, the weights are quantised, pickled or absent.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"model.path {folder}: holds no config.json" + (" (it is empty)" if not any(folder.iterdir()) else "")
        )
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not model_type:
        raise UserError(f"{file}: has no model_type; model.path must be the folder of a Hugging Face model")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise UserError(f"{file}: quantised weights ({method}) cannot be trained; use the unquantised model")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # slow to import

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (trust_remote_code and "auto_map" in raw):
        own_code = "the folder contains its code: set model.trust_remote_code=true to run it"
        hint = own_code if "auto_map" in raw else "update transformers"
        raise UserError(
            f"{file}: model_type {model_type!r} is not a causal language model known to transformers; {hint}"
        )
    return raw


def check_weight_files(folder: Path) -> None:
    """Raises ``UserError`` unless ``folder`` holds safetensors."""
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        problem = f"holds no {WEIGHTS}"
        if pickled:
            problem = f"pickled weights ({pickled[0]}) are not loaded; convert them to safetensors"
        raise UserError(f"{folder}: {problem}")
