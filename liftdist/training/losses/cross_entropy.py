"""Negative log-likelihood of the labelled tokens.

L = sum over labelled tokens t of  w_t (logsumexp(z_t) - z_t[y_t])
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from liftdist.data.tokenised import IGNORED


def summed(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """``logits [T, V], labels [T], weights [T] float32 or None -> []`` float32; labels equal to ``IGNORED`` are skipped."""
    if weights is None:
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return (F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none") * weights).sum()
