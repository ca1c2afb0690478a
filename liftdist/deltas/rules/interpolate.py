"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): between the base and one fine-tuned model, ``alpha D``."""

from __future__ import annotations

from torch import Tensor

from liftdist.errors import UserError


def merge(differences: Tensor, *, alpha: float) -> Tensor:
    if len(differences) != 1:
        raise UserError(f"--rule interpolate: takes one delta, not {len(differences)}; --rule sum has --weights")
    return alpha * differences[0]
