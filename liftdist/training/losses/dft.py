"""DFT: the loss of each token times its own probability (arXiv 2508.05629, equation 9).

L_t = sg(p_t[y_t]) (-log p_t[y_t])        sg: no gradient passes

Tokens that the model holds for improbable pull less than with cross-entropy. The reported loss is this one, which is no
likelihood: it is small where a token is certain, and where it is hopeless.
"""

from __future__ import annotations

from torch import Tensor

from liftdist.schema import TrainConfig
from liftdist.training.losses import Loss, cross_entropy


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """``logits [T, V], labels [T] -> [T]`` float32; zero where the label is ``IGNORED``."""
    return rescaled(cross_entropy.per_token(logits, labels))


def rescaled(losses: Tensor) -> Tensor:
    """Negative log-likelihoods ``[T]``, each times its likelihood, which is a constant to the gradient."""
    return losses.detach().neg().exp() * losses


def make(settings: TrainConfig) -> Loss:
    return Loss(per_token)
