"""Tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liftdist.data.tokenised import IGNORED, Samples


def collate(samples: Samples, sequences: Sequence[list[int]], pad_token: int = 0) -> dict[str, Tensor]:
    """Tensors of one micro-batch, padded on the right: causal attention never looks there.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``, each ``[sequences, longest]`` int64. Positions start again with every
        packed sample, which is how transformers keeps samples apart. Labels are shifted: ``labels[t]`` is the token
        to predict at ``t``. No sequence at all gives one padding token without a label.
    """
    rows = [samples.table[sequence] for sequence in sequences]
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
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch with the labels left on the host, where they are looked at."""
    return {key: value if key == "labels" else value.to(device) for key, value in batch.items()}
