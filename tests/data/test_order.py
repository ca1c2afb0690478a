"""The order of the samples: a function of seed and epoch, dealt to any number of ranks."""

import numpy as np

from liftdist.data.order import BatchOrder, epoch_sequences, split_micro_batches


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1, 101)
    order, starts = epoch_sequences(lengths, 5, False, 64, 2)
    again, _ = epoch_sequences(lengths, 5, False, 64, 2)
    other, _ = epoch_sequences(lengths, 5, False, 64, 3)
    assert (order == again).all()
    assert (order != other).any()
    assert sorted(order) == list(range(100))
    assert len(starts) == 101


def test_batches_cover_every_epoch_once_on_any_number_of_ranks():
    lengths = np.random.default_rng(0).integers(5, 60, 53)
    order = BatchOrder(lengths, 1, True, 128, 8)
    steps, consumed, seen, batches = order.steps(3), 0, [], []
    for _ in range(steps):
        batch = order.batch(consumed, 3)
        consumed += len(batch)
        batches.append(batch)
        seen += [sample for sequence in batch for sample in sequence]
    assert order.batch(consumed, 3) == []
    assert sorted(seen) == sorted(list(range(53)) * 3)
    assert all(sum(lengths[s] for s in sequence) <= 128 for batch in batches for sequence in batch)
    assert all(len(batch) == 8 for batch in batches[:-1])
    resumed = BatchOrder(lengths, 1, True, 128, 8)  # the consumed count is the whole state
    assert resumed.batch(8 * (steps - 2), 3) == batches[-2]
    for ranks in (1, 2, 3, 4, 7):
        dealt = [split_micro_batches(batches[0], lengths, rank, ranks, 2) for rank in range(ranks)]
        assert len({len(micro) for micro in dealt}) == 1  # every rank runs as many micro-batches
        together = [sequence for rank in dealt for micro in rank for sequence in micro]
        assert sorted(together) == sorted(batches[0])
