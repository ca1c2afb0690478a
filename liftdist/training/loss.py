"""The summed loss of the labelled tokens of a micro-batch: from the model's logits, or in chunks where it supports that."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from liftdist.data.tokenised import IGNORED
from liftdist.models.head import Loss
from liftdist.training.losses.cross_entropy import summed


def token_losses(model: nn.Module, batch: dict[str, Tensor], loss: Loss = summed) -> Tensor:
    """Sum of the losses of all labelled tokens of a micro-batch ``[B, L]``, float32 ``[]``.

    Logits are computed for labelled positions only, if the model supports that, and in chunks after
    :func:`liftdist.models.head.in_chunks`.

    Args:
        batch: ``[B, L]`` each: ``input_ids`` and ``position_ids`` on the device of the model; ``labels``, the next token at
            each position or ``IGNORED``, preferably on the host: finding the labelled positions then needs no device sync.
        loss: ``logits [T, V], labels [T] -> []``, see :data:`liftdist.registry.LOSSES`.
    """
    input_ids, position_ids, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    positions = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if not positions.numel():
        positions = positions.new_zeros(1)
    labels, positions = labels[:, positions].to(input_ids.device), positions.to(input_ids.device)
    if chunked := getattr(model, "chunked_loss", None):
        return chunked(input_ids, position_ids, positions, labels, loss)
    chosen = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **chosen).logits
    return loss((logits if chosen else logits[:, positions]).flatten(0, 1), labels.flatten())
