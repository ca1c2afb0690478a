"""A Hugging Face folder: the fine-tuned model as ``from_pretrained`` and servers read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from liftdist.deltas import delta as deltas
from liftdist.deltas.delta import Delta
from liftdist.deltas.folder import rewrite
from liftdist.distributed.collectives import together
from liftdist.models import check
from liftdist.models.weights import ModelFolder

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the fine-tuned model as a Hugging Face folder, with config, tokenizer, generation config and chat template of
    the base, in ``dtype`` or the base's own. Collective.

    Raises:
        UserError: ``target`` exists or cannot be written.
    """
    with together():
        stored = ModelFolder(base_folder)

    def edit(name: str, tensor: Tensor) -> Tensor:
        tensor = deltas.edit(name, tensor, None, deltas.by_name(name, delta))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def finish(temporary: Path) -> None:
        for path in base_folder.iterdir():
            if path.is_file() and path.suffix in COPIED_SUFFIXES and path.name != check.INDEX:
                shutil.copyfile(path, temporary / path.name)
        (temporary / deltas.ABOUT).write_text(json.dumps(delta.about(), indent=2) + "\n")
        if dtype is not None:
            config = json.loads((temporary / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)  # the older name of this key
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    rewrite(stored, target, edit, finish)
