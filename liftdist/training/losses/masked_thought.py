"""Masked thought: cross-entropy on responses some of whose tokens the model does not see (arXiv 2403.02178).

    p = ``train.mask_probability`` min(1, t / ``train.mask_warmup``)        t: the share of the steps that are done

Each response token of the input is replaced with probability p; labels stay. 0.4 and 0.66 are the authors' values for GSM8K, 0.2
is theirs for MetaMath. The replacement is the tokenizer's mask token or the one that ``train.mask_token`` names. The authors
add a new token with the mean of all embeddings, or take the padding token: here embeddings are frozen, and none is added.

A response token is one that is learned: the end of the sequence is, and a token of the data's that weighs 0 is not. Which are
replaced is a function of (seed, step, sample, position), so that neither ranks nor micro-batches nor packing change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from liftdist.data.tokenised import IGNORED
from liftdist.errors import UserError
from liftdist.schema import TrainConfig
from liftdist.training.losses import Loss, cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBABILITY, WARMUP = 0.4, 0.66


@dataclass(frozen=True)
class Masking:
    """How often response tokens are replaced."""

    probability: float
    warmup: float  # share of the steps

    def rate(self, step: int, steps: int) -> float:
        """The probability in ``step`` of ``steps``, counted from 1."""
        share = (step - 1) / steps
        return self.probability * (min(1.0, share / self.warmup) if self.warmup else 1.0)


def masked(
    batch: dict[str, Tensor],
    sequences: Sequence[Sequence[int]],
    lengths: np.ndarray,
    token: int,
    rate: float,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """A micro-batch with response tokens of its input replaced by ``token`` with probability ``rate``.

    Args:
        batch: ``[B, L]`` each, on the host, see :func:`liftdist.data.batches.collate`.
        sequences: the samples of each row.
        lengths: ``[samples]`` int64, the tokens of every sample.
    """
    chosen = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        begin = 0
        for sample in sequence:
            size = int(lengths[sample])
            # raw bits: numpy keeps their stream the same in all versions
            bits = np.random.PCG64(np.random.SeedSequence([seed, step, sample])).random_raw(size)
            chosen[row, begin : begin + size] = torch.from_numpy((bits >> 11) * 2.0**-53 < rate)
            begin += size
    response = (batch["labels"] != IGNORED).roll(1, 1)  # labels[t] is the token at t + 1; the last has none
    return batch | {"input_ids": batch["input_ids"].masked_fill(chosen & response, token)}


def token_id(tokenizer: PreTrainedTokenizerBase, settings: TrainConfig, vocabulary: int) -> int:
    """The id of the token that replaces others. Raises ``UserError`` if there is none, or the model has no embedding for it."""
    given = settings.mask_token
    if given is None and tokenizer.mask_token_id is None:
        spare = tokenizer.pad_token if tokenizer.pad_token_id != tokenizer.eos_token_id else None
        raise UserError(
            "train.loss=masked_thought: the tokenizer has no mask token; name a token that records do not hold, such as "
            f"{f'that for padding: train.mask_token={spare}' if spare else 'a reserved one: train.mask_token=TOKEN'}"
        )
    found = tokenizer.mask_token_id if given is None else tokenizer.get_vocab().get(given)
    if found is None:
        raise UserError(f"train.mask_token={given}: is no token of the tokenizer; give one as its vocabulary writes it")
    if found >= vocabulary:
        raise UserError(
            f"train.mask_token: token id {found} is outside the model's {vocabulary} embeddings; name another token"
        )
    return int(found)


def make(settings: TrainConfig) -> Loss:
    probability = PROBABILITY if settings.mask_probability is None else settings.mask_probability
    warmup = WARMUP if settings.mask_warmup is None else settings.mask_warmup
    return Loss(cross_entropy.make(settings).per_token, masking=Masking(probability, warmup))
