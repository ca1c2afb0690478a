"""Mean cross-entropy on the held-out data, ``eval/loss``, whatever ``train.loss`` and ``train.loss_reduction`` are."""

from __future__ import annotations

from transformers import PreTrainedModel

from liftdist.evaluation import held_out
from liftdist.methods.base import Method
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.inputs import Inputs


def run(context: RunContext, inputs: Inputs, model: PreTrainedModel, method: Method, step: int) -> dict[str, float]:
    """See :func:`liftdist.evaluation.held_out.means`. Collective."""
    return held_out.means(context, inputs, model, "loss", lambda batch: objective.token_losses(model, batch))
