"""How far the model is from the base model on the held-out data, ``eval/kl_to_base``, in nats a token.

mean over labelled tokens t of KL(b_t, p_t)        b: the base model's probabilities, p: the model's

0 before the first step. The direction is that of ``train.loss=asft``, see :mod:`liftdist.training.losses.asft`. Each micro-batch
takes a forward of the base model, whose values are put in place for it, and one of the model.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from liftdist.evaluation import held_out
from liftdist.methods.base import Method
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.inputs import Inputs
from liftdist.training.losses import asft


def run(context: RunContext, inputs: Inputs, model: PreTrainedModel, method: Method, step: int) -> dict[str, float]:
    """None without ``train.eval_kl``; else see :func:`liftdist.evaluation.held_out.means`. Collective."""
    if not context.config.train.eval_kl:
        return {}

    def divergence(batch: dict[str, Tensor]) -> Tensor:
        with method.at_base():
            base = objective.base_outputs(model, batch)
        return objective.token_losses(model, batch, asft.kl_to_base, base=base)

    return held_out.means(context, inputs, model, "kl_to_base", divergence)
