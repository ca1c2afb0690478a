"""Negative log-likelihood of the labelled tokens.

L_t = logsumexp(z_t) - z_t[y_t]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from liftdist.data.tokenised import IGNORED


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """``logits [T, V], labels [T] -> [T]`` float32; zero where the label is ``IGNORED``."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
