"""The order of samples, and how batches are split over ranks.

A sequence is a list of samples: one, or with packing as many as fit. The order is a pure function of (seed, epoch), and
a batch is split only after it is composed: every world size sees the same global batches, and the number of sequences
consumed is the complete state of the data.

The samples of a source are walked through pass after pass, each in an order of its own: of a source of which an epoch takes half
the next takes the other half, and no sample comes again before all others have come. Epochs mix the sources sample by sample.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 2**16  # samples that are Python numbers at a time


class Share(NamedTuple):
    """A source's part of an epoch."""

    size: int  # samples of the source
    taken: int  # samples that an epoch takes of it


def epoch_order(shares: Sequence[Share], seed: int, epoch: int) -> np.ndarray:
    """The samples of one epoch, ``[samples]`` int64, those of each source numbered after those of the one before."""
    # numpy takes the words [seed, epoch] as [seed, epoch, 0, 0]: the first source has the order that it has alone
    sizes = [share.size for share in shares]
    walks = [_walk(share, seed, number, epoch) for number, share in enumerate(shares)]
    if len(walks) == 1:
        return walks[0]
    turns = np.repeat(np.arange(len(shares), dtype=np.min_scalar_type(len(shares))), [share.taken for share in shares])
    _random(seed, epoch, 0, 1).shuffle(turns)
    order = np.empty(len(turns), np.int64)
    for number, walk in enumerate(walks):
        order[turns == number] = walk + sum(sizes[:number])
    return order


def _walk(share: Share, seed: int, source: int, epoch: int) -> np.ndarray:
    """The samples that an epoch takes of a source: those at ``[epoch * taken, (epoch + 1) * taken)`` of its passes."""
    begin, end = epoch * share.taken, (epoch + 1) * share.taken
    passes = range(begin // share.size, -(-end // share.size))
    walk = np.empty(share.taken, np.int64)
    for number in passes:
        order, first = _random(seed, number, source).permutation(share.size), number * share.size - begin
        walk[max(first, 0) : first + share.size] = order[max(-first, 0) : end - number * share.size]
    return walk


def _random(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(words))


def epoch_sequences(
    lengths: np.ndarray, seed: int, packing: bool, max_length: int, epoch: int, shares: Sequence[Share] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of one epoch: a pure function of its arguments.

    Args:
        lengths: ``[samples]`` int64, of the samples of all sources, one after the other.
        shares: of each source; one that gives each sample once if there are none.

    Returns:
        ``order`` [samples of the epoch] int64, and ``starts`` [sequences + 1]: sequence ``i`` is
        ``order[starts[i]:starts[i + 1]]``.
    """
    order = epoch_order(shares or [Share(len(lengths), len(lengths))], seed, epoch)
    if not packing:
        return order, np.arange(len(order) + 1)
    starts, room = array.array("q"), 0
    blocks = (lengths[order[at : at + BLOCK]].tolist() for at in range(0, len(order), BLOCK))
    for place, length in enumerate(itertools.chain.from_iterable(blocks)):
        if length > room:
            starts.append(place)
            room = max_length
        room -= length
    return order, np.array([*starts, len(order)])


class BatchOrder:
    """The stream of global batches. A batch may span epochs; only the last one may be smaller."""

    def __init__(
        self,
        lengths: np.ndarray,
        seed: int,
        packing: bool,
        max_length: int,
        batch_size: int,
        shares: Sequence[Share] = (),
    ) -> None:
        self._batch_size = batch_size
        make = functools.partial(epoch_sequences, lengths, seed, packing, max_length, shares=shares)
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
