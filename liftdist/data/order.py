"""The order of samples, and how batches are split over ranks.

A sequence is a list of samples: one, or with packing as many as fit. The order is a pure function of (seed, epoch), and
a batch is split only after it is composed: every world size sees the same global batches, and the number of sequences
consumed is the complete state of the data.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np


def epoch_sequences(
    lengths: np.ndarray, seed: int, packing: bool, max_length: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of one epoch: a pure function of its arguments.

    Returns:
        ``order`` [samples] int64, and ``starts`` [sequences + 1]: sequence ``i`` is
        ``order[starts[i]:starts[i + 1]]``.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths))
    if not packing:
        return order, np.arange(len(order) + 1)
    starts, room = [], 0
    for place, length in enumerate(lengths[order].tolist()):
        if length > room:
            starts.append(place)
            room = max_length
        room -= length
    return order, np.array([*starts, len(order)])


class BatchOrder:
    """The stream of global batches. A batch may span epochs; only the last one may be smaller."""

    def __init__(self, lengths: np.ndarray, seed: int, packing: bool, max_length: int, batch_size: int) -> None:
        self._batch_size = batch_size
        make = functools.partial(epoch_sequences, lengths, seed, packing, max_length)
        self._epoch = functools.lru_cache(maxsize=2)(make)
        self._before = [0]  # sequences before each epoch

    def _begin(self, epoch: int) -> int:
        while len(self._before) <= epoch:
            _, starts = self._epoch(len(self._before) - 1)
            self._before.append(self._before[-1] + len(starts) - 1)
        return self._before[epoch]

    def steps(self, epochs: int, consumed: int = 0) -> int:
        """Batches left in ``epochs`` epochs after ``consumed`` sequences."""
        return max(0, -(-(self._begin(epochs) - consumed) // self._batch_size))

    def batch(self, consumed: int, epochs: int | None = None) -> list[list[int]]:
        """The global batch after ``consumed`` sequences, as lists of sample numbers; nothing beyond ``epochs``."""
        batch: list[list[int]] = []
        epoch = 0
        while self._begin(epoch + 1) <= consumed:
            epoch += 1
        while len(batch) < self._batch_size and (epochs is None or epoch < epochs):
            order, starts = self._epoch(epoch)
            first = consumed + len(batch) - self._begin(epoch)
            for begin, end in itertools.pairwise(starts[first : first + self._batch_size - len(batch) + 1].tolist()):
                batch.append(order[begin:end].tolist())
            epoch += 1
        return batch


def split_micro_batches(
    batch: Sequence[list[int]], lengths: np.ndarray, rank: int, ranks: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """This rank's micro-batches of a global batch: the same number on every rank, some empty if sequences do not suffice.

    Sequences are assigned round-robin in descending length, which balances the work of ranks and reduces padding.
    """
    ordered = sorted(batch, key=lambda sequence: -int(sum(lengths[sample] for sample in sequence)))
    mine = ordered[rank::ranks]
    rounds = -(-len(ordered) // (ranks * micro_batch_size))
    return [mine[turn * micro_batch_size : (turn + 1) * micro_batch_size] for turn in range(rounds)]
