"""What training minimises: a weighted sum of the losses of labelled tokens, and the number by which it is divided.

    token       sum over tokens of their loss                        / labelled tokens
    sequence    sum over samples of the mean loss of their tokens    / samples with labelled tokens

If the data gives weights of tokens, all means are weighted means, and the divisor of ``token`` is the sum of the weights: a token
of weight 2 counts as one that comes twice. A sample counts once for ``sequence``, whatever its tokens weigh.

Sum and divisor are added over micro-batches and ranks before the division, so that neither how a batch is split nor padding
or packing changes the result. Logits come from the model, or in chunks where it supports that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liftdist.data.tokenised import IGNORED
from liftdist.models.head import PerToken, Terms, evaluating, text_inputs
from liftdist.training.losses.cross_entropy import per_token


def weigh(batch: dict[str, Tensor], reduction: str) -> tuple[Tensor | None, float]:
    """The weights of the token losses of a micro-batch, and its part of the divisor.

    Args:
        batch: ``[B, L]`` each, on the host, see :func:`liftdist.data.batches.collate`.
        reduction: ``train.loss_reduction``.

    Returns:
        For ``token``: None and the number of labels; of a batch with weights, ``[B, L]`` float32, those of labelled positions and
        0 elsewhere, and their sum. For ``sequence``: ``[B, L]`` float32, 1 / (labels of its sample) at each labelled position
        and 0 elsewhere, with weights their share of the sample's, and the number of samples with labels; a packed sequence holds
        several samples.
    """
    labelled = _weights(batch)
    if reduction == "token":
        if "weights" not in batch:
            return None, int(labelled.sum())
        return labelled, float(labelled.double().sum())
    sample, sums = _sums_of_samples(batch)
    weights = labelled / sums[sample].view_as(labelled).masked_fill(labelled == 0, 1)
    return weights, int((sums > 0).sum())


def divisors(batch: dict[str, Tensor], reduction: str, sources: int) -> Tensor:
    """The divisor of :func:`weigh` by source, ``[sources]`` float64: of the batch's labels or samples those that are of each."""
    if reduction == "token":
        return torch.bincount(batch["sources"].flatten(), _weights(batch).double().flatten(), sources)
    _, sums = _sums_of_samples(batch)
    of_samples = batch["sources"][batch["position_ids"] == 0]
    return torch.bincount(of_samples[sums > 0], minlength=sources).double()


def _weights(batch: dict[str, Tensor]) -> Tensor:
    """``[B, L]`` float32: the weight of each label, 1 if the batch has none of its own; 0 elsewhere."""
    labelled = (batch["labels"] != IGNORED).float()
    return labelled * batch["weights"] if "weights" in batch else labelled


def _sums_of_samples(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sample of each position, ``[B L]`` int64, and the weights of each sample's labels, summed, ``[samples]`` float32."""
    sample = (batch["position_ids"] == 0).flatten().cumsum(0) - 1  # positions restart at each sample; padding goes on
    return sample, torch.zeros(int(sample[-1]) + 1).index_add_(0, sample, _weights(batch).flatten())


def token_losses(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    loss: PerToken = per_token,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Sum of the losses of all labelled tokens of a micro-batch ``[B, L]``, float32 ``[]``.

    Logits are computed for labelled positions only, if the model supports that, and in chunks after
    :func:`liftdist.models.head.in_chunks`. A model that does not separate packed samples by their positions alone is given
    what it needs after :func:`liftdist.training.packing.keep_apart`.

    Args:
        batch: ``[B, L]`` each: ``input_ids`` and ``position_ids`` on the device of the model; ``labels``, the next token at
            each position or ``IGNORED``, preferably on the host: finding the labelled positions then needs no device sync;
            with ``sums``, ``sources``, the number of the source that each token is of, where the labels are.
        loss: ``logits [T, V], labels [T] -> [T]``, see :mod:`liftdist.training.losses`.
        weights: ``[B, L]`` float32, the factor of each token's loss, where the labels are; None: all are 1.
        sums: ``[sources]`` float64 on the device of the model, to which the part of each source is added.
        base: what :func:`base_outputs` gave of the base model for the same batch, if ``loss`` compares with it.
    """
    input_ids, position_ids, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    positions = _labelled_positions(labels)

    def chosen_of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, positions].to(input_ids.device).flatten()

    terms = Terms(chosen_of(weights), chosen_of(None if sums is None else batch["sources"]), sums)
    labels, positions = labels[:, positions].to(input_ids.device), positions.to(input_ids.device)
    if chunked := getattr(model, "chunked_loss", None):
        return chunked(
            input_ids, position_ids, positions, labels, loss, terms, base, **_separation(model, position_ids)
        )
    logits = _logits(model, input_ids, position_ids, positions)
    return terms.add(loss(logits, labels.flatten(), *(() if base is None else (base,))))


def base_outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What a loss needs of the base model, which ``model`` must be for the call; without dropout and gradients.

    Returns:
        For ``P`` positions with a label in any row: the last hidden states ``[B P, d]`` if the loss is computed in chunks, as
        the head is frozen and that of both models; else the logits ``[B P, V]``.
    """
    input_ids, position_ids = batch["input_ids"], batch["position_ids"]
    positions = _labelled_positions(batch["labels"]).to(input_ids.device)
    with evaluating(model):
        if hidden_at := getattr(model, "hidden_at", None):
            return hidden_at(input_ids, position_ids, positions, **_separation(model, position_ids))
        return _logits(model, input_ids, position_ids, positions)


def _labelled_positions(labels: Tensor) -> Tensor:
    """``[P]`` int64: the positions that have a label in any row; one, if none has."""
    positions = (labels != IGNORED).any(0).nonzero().squeeze(1)
    return positions if positions.numel() else positions.new_zeros(1)


def _separation(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """What the model is given, besides positions, to keep packed samples apart."""
    separating = getattr(model, "separating", None)
    return separating(position_ids) if separating else {}


def _logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, positions: Tensor) -> Tensor:
    """``[B P, V]``: the logits at ``positions [P]``, no others if the model supports that."""
    chosen = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    others = chosen | _separation(model, position_ids)
    logits = model(**text_inputs(model, model.config, input_ids, position_ids), **others).logits
    return (logits if chosen else logits[:, positions]).flatten(0, 1)
