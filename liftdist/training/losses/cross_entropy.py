"""Negative log-likelihood of the labelled tokens; with smoothed labels, and with a penalty on the normaliser.

L_t = (1 - e) (-log p_t[y_t]) + e mean over v of (-log p_t[v]) + c logsumexp(z_t)^2

e is ``train.label_smoothing`` (arXiv 1512.00567), c is ``train.z_loss`` (PaLM, arXiv 2204.02311, which takes 1e-4). Both are 0
unless they are set. The mean is over the model's whole vocabulary, padding of the embedding included.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from liftdist.data.tokenised import IGNORED
from liftdist.schema import TrainConfig
from liftdist.training.losses import Loss


def per_token(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """``logits [T, V], labels [T] -> [T]`` float32; zero where the label is ``IGNORED``."""
    logits = logits.float()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * logits.logsumexp(-1).square() * (labels != IGNORED) if z_loss else losses


def make(settings: TrainConfig) -> Loss:
    return Loss(functools.partial(per_token, label_smoothing=settings.label_smoothing, z_loss=settings.z_loss))
