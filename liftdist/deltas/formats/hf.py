"""A Hugging Face folder: the fine-tuned model as ``from_pretrained`` and servers read it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftdist import files
from liftdist.deltas import delta as deltas
from liftdist.deltas import older
from liftdist.deltas.delta import Delta
from liftdist.deltas.folder import edit_json, rewrite, say_left_out
from liftdist.distributed.collectives import together
from liftdist.models import check
from liftdist.models.weights import ModelFolder
from liftdist.safetensors_io import DTYPES

COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of the tokenizer


def write(
    delta: Delta,
    base_folder: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    lay_over: Callable[[str, Tensor, Tensor], Tensor] = lambda _, base, edited: edited,  # noqa: ARG005
) -> None:
    """Write the fine-tuned model as a Hugging Face folder, with config, tokenizer, generation config and chat template of
    the base, in ``dtype`` or that which holds the base's weights and the new ones. Of the base's other weights nothing is
    copied. Tensors that the base holds in another dtype than most of its weights, such as the biases of routers in float32,
    keep theirs. What the base holds quantised is written as the weights that it stands for. Collective.

    Args:
        replace: replace an existing folder, in one step.
        lay_over: the tensor to write, from its name, the base's, and that after the change.

    Raises:
        UserError: ``target`` exists or cannot be written.
    """
    with together():
        stored = ModelFolder(base_folder)
    main = _main_dtype(stored)
    if dtype is None and delta.whole is None and (wide := _widened(main, delta)) != main:
        dtype = wide  # of all, and in the config, by which whoever loads the model rounds it

    def edit(name: str, tensor: Tensor) -> Tensor:
        if delta.whole is not None and name in delta.known:  # as it is, without a list of what changed
            edited = delta.whole(name, tensor)
        else:
            edited = deltas.edit(name, tensor, [], deltas.changes(name, delta))
        edited = lay_over(name, tensor, edited)
        return edited.to(dtype) if dtype is not None and tensor.dtype == main else edited

    def finish(temporary: Path) -> None:
        say_left_out(stored)
        for path in base_folder.iterdir():
            settings = path.is_file() and path.suffix in COPIED_SUFFIXES and not check.is_weights(path.name)
            if settings or path.name == CHAT_TEMPLATES:
                files.copy(path, temporary / path.name)
        delta.write_about(temporary)
        edit_json(temporary / "tokenizer_config.json", older.tokenizer_config)
        edit_json(temporary / "config.json", lambda settings: older.model_config(_with_dtype(settings, dtype)))

    rewrite(stored, target, edit, finish, replace, {} if dtype is None else {main: dtype})


def _main_dtype(stored: ModelFolder) -> torch.dtype:
    """The dtype that most weights of a folder have."""
    weights: Counter[str] = Counter()
    for name in stored.file_of:
        weights[stored.info(name)["dtype"]] += math.prod(stored.info(name)["shape"])
    return DTYPES[weights.most_common(1)[0][0]]


def _widened(main: torch.dtype, delta: Delta) -> torch.dtype:
    """The dtype that holds ``main`` and what becomes of the tensors that have it."""
    dtypes = (change.dtype for name in delta.names if (change := delta.get(name)).stored == main)
    return functools.reduce(torch.promote_types, dtypes, main)


def _with_dtype(settings: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    if dtype is None:
        return settings
    kept = {key: value for key, value in settings.items() if key != "torch_dtype"}  # the older name of this key
    return kept | {"dtype": str(dtype).removeprefix("torch.")}
