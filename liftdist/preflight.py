"""What can be known to be wrong before ranks are started and weights are read: paths, files, the kind of model.

Imports no torch by itself, so that a wrong path is reported at once.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from liftdist.data import sources as records
from liftdist.runs import claims as rundir
from liftdist.schema import Config, UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HUB_DUPLICATES = ["consolidated*", "*/*"]  # the same weights in another layout
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(path: str, weights: bool = True) -> Path:
    """The local folder of a model, fetched from the hub (into its cache) if ``path`` is a hub name.

    Raises:
        UserError: no such folder or hub model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(
            f"model.path {path}: " + ("is a file, name its folder" if folder.exists() else "no such folder")
        )
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES if weights else [p for p in HUB_FILES if "safetensors" not in p]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the library raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.path {path}: no such folder, and not to be had from the hub: {reason}") from None


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
        raise UserError(f"{file}: names no model_type")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise UserError(f"{file}: quantised weights ({method}) cannot be trained; use the unquantised model")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # takes seconds

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (trust_remote_code and "auto_map" in raw):
        hint = "; its code comes with it: set model.trust_remote_code=true to run it" if "auto_map" in raw else ""
        raise UserError(f"{file}: model_type {model_type!r} is no causal language model that transformers knows{hint}")
    return raw


def check_weight_files(folder: Path) -> None:
    """Raises ``UserError`` unless ``folder`` holds safetensors."""
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        problem = f"holds no {WEIGHTS}"
        if pickled:
            problem = f"pickled weights ({pickled[0]}) are not loaded; convert them to safetensors"
        raise UserError(f"{folder}: {problem}")


def check_cache_dir(config: Config) -> None:
    """Raises ``UserError`` unless the cache can be written."""
    cache_dir = Path(config.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise UserError(f"cache_dir {cache_dir}: cannot be written: {error.strerror}") from None


def check(config: Config, ranks: int | None, training: bool) -> None:
    """What takes seconds and needs no ranks: the layout, the run directory, the first records, the kind of model.

    Raises:
        UserError: the first thing that is wrong.
    """
    if ranks is not None:
        config.mesh.layout(ranks)
    check_cache_dir(config)
    if training:
        rundir.check_free(Path(config.run_dir).expanduser())
        records.check_first_records(config.data)
    folder = resolve_model(config.model.path, weights=False)
    if folder == Path(config.model.path).expanduser():
        check_weight_files(folder)
    check_model_folder(folder, config.model.trust_remote_code)
