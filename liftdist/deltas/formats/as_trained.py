"""A Hugging Face folder of a run with ``model.base_dtype``: to the bit the model that was trained and evaluated.

The matrices of the decoder are rounded as the run rounded them, and dequantised; the weights that it trained are exact over them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from liftdist.deltas.delta import AS_TRAINED, Delta
from liftdist.deltas.formats import hf
from liftdist.engine.matrices import principal_matrices
from liftdist.engine.quantisation import Format
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import names
from liftdist.models.build import build, check_type
from liftdist.models.weights import ModelFolder


def write(delta: Delta, base_folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder as :mod:`liftdist.deltas.formats.hf` does.

    Args:
        dtype: of the model that is written; that of the run by default, in which the base is rounded whatever this is.

    Raises:
        UserError: the delta is not all that a run with ``model.base_dtype`` has trained; the base model brings its own code, and
            the delta is not of a run with ``model.trust_remote_code``; ``target`` exists or cannot be written.
    """
    kind = delta.made.get("base_dtype")
    if kind is None or delta.made.get("lossy"):
        raise UserError(
            f"--format as_trained: is for runs with model.base_dtype, and deltas that hold all that one has trained; "
            f"{delta.location} {'is no such' if kind is None else 'was compressed with losses'}: use hf"
        )
    computed = getattr(torch, delta.made["dtype"])
    config = ModelConfig(path=str(base_folder), trust_remote_code=delta.trusted)
    model = build(check_type(base_folder, config), config)
    pieces = names.match(model, ModelFolder(base_folder)).pieces
    formats = {
        piece.source: (Format(kind, place.width), bool(piece.across))
        for place in principal_matrices(model).values()
        for piece in pieces[place.parameter]
    }

    def over_rounded(name: str, base: Tensor, edited: Tensor) -> Tensor:
        if name not in formats:
            return edited
        format, is_transposed = formats[name]
        held = base.to(computed).mT.contiguous() if is_transposed else base.to(computed)
        rounded = format.rounded(held.view(-1, format.columns)).view(held.shape)
        rounded = rounded.mT.contiguous() if is_transposed else rounded
        if name in delta.known:
            trained = delta.get(name).indices
            rounded.view(-1)[trained] = edited.view(-1)[trained].to(computed)
        return rounded

    marked = replace(delta, made={**delta.made, AS_TRAINED: True})
    hf.write(marked, base_folder, target, dtype or computed, lay_over=over_rounded)
