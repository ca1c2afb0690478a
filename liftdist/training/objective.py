"""What training minimises: a weighted sum of the losses of labelled tokens, and the number by which it is divided.

    token       sum over tokens of their loss                        / labelled tokens
    sequence    sum over samples of the mean loss of their tokens    / samples with labelled tokens

Sum and divisor are added over micro-batches and ranks before the division, so that neither how a batch is split nor padding
or packing changes the result. Logits come from the model, or in chunks where it supports that.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liftdist.data.tokenised import IGNORED
from liftdist.models.head import Loss, Terms, text_inputs
from liftdist.training.losses.cross_entropy import per_token


def weigh(batch: dict[str, Tensor], reduction: str) -> tuple[Tensor | None, int]:
    """The weights of the token losses of a micro-batch, and its part of the divisor.

    Args:
        batch: ``[B, L]`` each, on the host, see :func:`liftdist.data.batches.collate`.
        reduction: ``train.loss_reduction``.

    Returns:
        For ``token``: None and the number of labels. For ``sequence``: ``[B, L]`` float32, 1 / (labels of its sample) at each
        labelled position and 0 elsewhere, and the number of samples with labels; a packed sequence holds several samples.
    """
    labelled = batch["labels"] != IGNORED
    if reduction == "token":
        return None, int(labelled.sum())
    sample, labels = _labels_of_samples(batch)
    weights = labelled / labels[sample].view_as(labelled).clamp_min(1)
    return weights, int((labels > 0).sum())


def divisors(batch: dict[str, Tensor], reduction: str, sources: int) -> Tensor:
    """The divisor of :func:`weigh` by source, ``[sources]`` int64: of the batch's labels or samples those that are of each."""
    if reduction == "token":
        return torch.bincount(batch["sources"][batch["labels"] != IGNORED], minlength=sources)
    _, labels = _labels_of_samples(batch)
    of_samples = batch["sources"][batch["position_ids"] == 0]
    return torch.bincount(of_samples[labels > 0], minlength=sources)


def _labels_of_samples(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sample of each position, ``[B L]`` int64, and the labels of each sample, ``[samples]`` float32."""
    sample = (batch["position_ids"] == 0).flatten().cumsum(0) - 1  # positions restart at each sample; padding goes on
    labelled = (batch["labels"] != IGNORED).flatten().float()
    return sample, torch.zeros(int(sample[-1]) + 1).index_add_(0, sample, labelled)


def token_losses(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    loss: Loss = per_token,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Sum of the losses of all labelled tokens of a micro-batch ``[B, L]``, float32 ``[]``.

    Logits are computed for labelled positions only, if the model supports that, and in chunks after
    :func:`liftdist.models.head.in_chunks`. A model that does not separate packed samples by their positions alone is given
    what it needs after :func:`liftdist.training.packing.keep_apart`.

    Args:
        batch: ``[B, L]`` each: ``input_ids`` and ``position_ids`` on the device of the model; ``labels``, the next token at
            each position or ``IGNORED``, preferably on the host: finding the labelled positions then needs no device sync;
            with ``sums``, ``sources``, the number of the source that each token is of, where the labels are.
        loss: ``logits [T, V], labels [T] -> [T]``, see :data:`liftdist.registry.LOSSES`.
        weights: ``[B, L]`` float32, the factor of each token's loss, where the labels are; None: all are 1.
        sums: ``[sources]`` float64 on the device of the model, to which the part of each source is added.
    """
    input_ids, position_ids, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    positions = (labels != IGNORED).any(0).nonzero().squeeze(1)
    if not positions.numel():
        positions = positions.new_zeros(1)

    def chosen_of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, positions].to(input_ids.device).flatten()

    terms = Terms(chosen_of(weights), chosen_of(None if sums is None else batch["sources"]), sums)
    labels, positions = labels[:, positions].to(input_ids.device), positions.to(input_ids.device)
    separating = getattr(model, "separating", None)
    others = separating(position_ids) if separating else {}
    if chunked := getattr(model, "chunked_loss", None):
        return chunked(input_ids, position_ids, positions, labels, loss, terms, **others)
    chosen = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(**text_inputs(model, model.config, input_ids, position_ids), **chosen, **others).logits
    return terms.add(loss((logits if chosen else logits[:, positions]).flatten(0, 1), labels.flatten()))
