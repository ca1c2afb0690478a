"""Checks of a model folder before weights are read, and what weights look like. Imports torch only to say why one is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liftdist.errors import UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

#: A file that some loader takes for weights: by its extension, before which an index or a copy may add its own.
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pt2|pte|ckpt|pkl|pickle|h5|keras|msgpack|npz|npy|ot|pb|tflite|litertlm|task|gguf|ggml|"
    r"llamafile|onnx|onnx[_.]data\w*|ort|mlmodel|mlpackage|nemo|engine|plan|distcp|params)"
    r"(\.index(\..*)?\.json|\.data-\d+-of-\d+|\.(bak|backup|old|orig|copy|tmp|incomplete|part\w*|\d+)|~)*$|^adapter_config\.json$|"
    r"^openvino.*\.xml$",
    re.IGNORECASE,
)

#: Forms of quantised weights that are read, see :mod:`liftdist.models.quantised_files`: methods, formats of compressed-tensors.
_READ = ("mxfp4", "fp8", "mxfp8", "bitsandbytes", "float-quantized", "naive-quantized")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or belongs to a file that does: of a model in any format, or an adapter."""
    return _WEIGHTS.search(name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``UserError`` if there is none, or the file cannot be read."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # transformers reads no byte order mark either
        hint = "; save it without the byte order mark" if "BOM" in str(error) else ""
        raise UserError(f"{path}: {error}{hint}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no JSON object")
    return raw


def quantisation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``config.json`` says of how its weights are quantised, or its part on the language model; None if they are not."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or None


def why_unread(settings: Mapping[str, Any]) -> str | None:
    """The name of a form of quantised weights that is not read, from :func:`quantisation`; None of one that is."""
    method = settings.get("quant_method", "unknown method")
    if method == "bitsandbytes" and not settings.get("load_in_4bit"):
        return "bitsandbytes, 8 bits"
    if method == "compressed-tensors":
        form = settings.get("format")
        return None if form in _READ else f"compressed-tensors, {form}"
    return None if method in _READ else method


def check_model_folder(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        UserError: it is absent or damaged, the model type is unknown, the weights are quantised in a form that is not read.
    """
    file = folder / "config.json"
    try:
        if not file.is_file():
            raise UserError(
                f"model.path {folder}: holds no config.json" + (" (it is empty)" if not any(folder.iterdir()) else "")
            )
    except OSError as error:
        raise UserError(f"model.path {folder}: cannot be read: {error.strerror}") from None
    raw = read_json(file)
    model_type = raw.get("model_type")
    if not model_type:
        raise UserError(f"{file}: has no model_type; model.path must be the folder of a Hugging Face model")
    settings = quantisation(raw)
    if settings is not None and (form := why_unread(settings)) is not None:
        raise UserError(f"{file}: quantised weights ({form}) cannot be read; use the unquantised model")
    if _is_listed(model_type):
        return raw
    from transformers.models.auto import configuration_auto, modeling_auto  # slow to import

    known = {**modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    if model_type not in known and not (trust_remote_code and "auto_map" in raw):
        if "auto_map" in raw:
            hint = "the folder contains its code: set model.trust_remote_code=true to run it"
        elif model_type in configuration_auto.CONFIG_MAPPING_NAMES:
            hint = "models of this type do not continue texts; give a causal one"
        else:
            hint = "update transformers"
        raise UserError(
            f"{file}: model_type {model_type!r} is not a causal language model known to transformers; {hint}"
        )
    return raw


def _is_listed(model_type: str) -> bool:
    """Whether the source of transformers lists a type as that of a causal language model; False may mean another layout.

    Read as text, because its import brings torch with it, and takes ten times as long as all other checks.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return False
    source = Path(package.origin).parent / "models" / "auto" / "modeling_auto.py"
    if not source.is_file():
        return False
    table = r"^MODEL_FOR_(?:CAUSAL|MULTIMODAL)_LM_MAPPING_NAMES = OrderedDict\($(.*?)^\)"
    tables = re.findall(table, source.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return any(f'("{model_type}", ' in table for table in tables)
