"""Tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from liftdist.data.mixture import Mixture
from liftdist.data.tokenised import IGNORED, Samples


def collate(samples: Samples | Mixture, sequences: Sequence[list[int]], pad_token: int = 0) -> dict[str, Tensor]:
    """Tensors of one micro-batch of sequences of samples, see :func:`pack`.

    Of several sources also ``sources``, the number of the source that a token is of; padding is of the first.
    """
    batch = pack([samples.table[sequence] for sequence in sequences], pad_token)
    if isinstance(samples, Mixture) and len(samples.parts) > 1:
        batch["sources"] = _sources(samples, sequences, batch["input_ids"].shape)
    return batch


def pack(rows: Sequence[Mapping[str, Sequence[Any]]], pad_token: int = 0) -> dict[str, Tensor]:
    """Tensors of one micro-batch, padded on the right, which causal attention of real tokens never reads.

    Args:
        rows: of each sequence the ``input_ids`` of its samples, their ``labels``, and their ``weights``, None for 1 everywhere.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``, each ``[sequences, longest]`` int64. Positions restart at 0 with every
        packed sample, by which transformers separates samples. Labels are shifted: ``labels[t]`` is the token to
        predict at ``t``. An empty list of sequences gives one padding token without a label. If a sample has weights, also
        ``weights``, float32: that of each label.
    """
    longest = max((sum(map(len, row["input_ids"])) for row in rows), default=1)
    shape = (max(len(rows), 1), longest)
    input_ids = torch.full(shape, pad_token)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.arange(longest).repeat(shape[0], 1)
    for index, row in enumerate(rows):
        begin = 0
        for ids, targets in zip(row["input_ids"], row["labels"], strict=True):
            end = begin + len(ids)
            input_ids[index, begin:end] = torch.tensor(ids)
            labels[index, begin : end - 1] = torch.tensor(targets[1:])
            position_ids[index, begin:end] = torch.arange(len(ids))
            begin = end
        position_ids[index, begin:] = torch.arange(longest - begin) + (
            len(row["input_ids"][-1]) if row["input_ids"] else 0
        )
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    if any(weights is not None for row in rows for weights in row.get("weights", ())):
        batch["weights"] = _weights(rows, shape)
    return batch


def _weights(rows: Sequence[Mapping[str, Sequence[Any]]], shape: Sequence[int]) -> Tensor:
    """The weight of each label, as ``shape``; 1 where a sample has none, and where there is no label."""
    found = torch.ones(*shape)
    for index, row in enumerate(rows):
        begin = 0
        for ids, weights in zip(row["input_ids"], row["weights"], strict=True):
            end = begin + len(ids)
            if weights is not None:
                found[index, begin : end - 1] = torch.tensor(weights[1:])
            begin = end
    return found


def _sources(samples: Mixture, sequences: Sequence[list[int]], shape: Sequence[int]) -> Tensor:
    """The number of the source that each token is of, as ``shape``."""
    sources = torch.zeros(*shape, dtype=torch.int64)
    for index, sequence in enumerate(sequences):
        begin = 0
        for sample in sequence:
            end = begin + int(samples.lengths[sample])
            sources[index, begin:end] = samples.source_of(sample)
            begin = end
    return sources


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on ``device``, except what goes with labels: the loss looks up labelled positions on the host."""
    return {key: value if key in ("labels", "sources", "weights") else value.to(device) for key, value in batch.items()}
