"""The summed loss of the labelled tokens of a micro-batch: by the model's own logits, or in chunks where it can."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from liftdist.data.tokenised import IGNORED
from liftdist.models.head import Loss
from liftdist.training.losses.cross_entropy import summed


def token_losses(model: nn.Module, batch: dict[str, Tensor], loss: Loss = summed) -> Tensor:
    """Sum of the losses of all labelled tokens of a micro-batch ``[B, L]``, float32 ``[]``.

    Logits are computed for labelled places alone, where the model can,
    and in chunks after :func:`liftdist.models.head.in_chunks`.

    Args:
        batch: ``input_ids``, ``position_ids`` on the device of the model, and ``labels``, the next token at each place or
            ``IGNORED``, which may be on the host: then nobody waits for the device to know which are labelled.
        loss: of logits and labels, see :data:`liftdist.registry.LOSSES`.
    """
    input_ids, position_ids, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    places = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if not places.numel():
        places = places.new_zeros(1)
    labels, places = labels[:, places].to(input_ids.device), places.to(input_ids.device)
    if chunked := getattr(model, "chunked_loss", None):
        return chunked(input_ids, position_ids, places, labels, loss)
    chosen = {"logits_to_keep": places} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **chosen).logits
    return loss((logits if chosen else logits[:, places]).flatten(0, 1), labels.flatten())
