"""ASFT: DFT, anchored to the base model (arXiv 2509.23753).

L_t = sg(p_t[y_t]) (-log p_t[y_t]) + c KL(b_t, p_t)        KL(b, p) = sum over v of b[v] (log b[v] - log p[v])

b_t are the probabilities of the base model, c is ``train.kl_weight``, 0.1 as in the authors' code. So is the direction there, the
base model first (``F.kl_div(log p, b)``), over the whole vocabulary at each labelled token. The base model is the trained one
with its base values put back: there is no second model, but a second forward, without dropout.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from liftdist.data.tokenised import IGNORED
from liftdist.schema import TrainConfig
from liftdist.training.losses import Loss, dft

KL_WEIGHT = 0.1


def per_token(logits: Tensor, labels: Tensor, base_logits: Tensor, kl_weight: float) -> Tensor:
    """``logits [T, V], labels [T], base_logits [T, V] -> [T]`` float32; zero where the label is ``IGNORED``."""
    log_p = F.log_softmax(logits.float(), -1)
    losses = F.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="none")
    return dft.rescaled(losses) + kl_weight * _divergence(log_p, base_logits) * (labels != IGNORED)


def kl_to_base(logits: Tensor, labels: Tensor, base_logits: Tensor) -> Tensor:
    """KL(b, p) of each labelled token ``[T]`` float32, in nats; the arguments are those of :func:`per_token`."""
    return _divergence(F.log_softmax(logits.float(), -1), base_logits) * (labels != IGNORED)


def _divergence(log_p: Tensor, base_logits: Tensor) -> Tensor:
    log_b = F.log_softmax(base_logits.float(), -1)
    return F.kl_div(log_p, log_b, reduction="none", log_target=True).sum(-1)


def make(settings: TrainConfig) -> Loss:
    if not settings.needs_base:
        return dft.make(settings)
    weight = KL_WEIGHT if settings.kl_weight is None else settings.kl_weight
    return Loss(functools.partial(per_token, kl_weight=weight), needs_base=True)
