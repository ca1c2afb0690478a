"""How rows are dealt to shards."""

import itertools

import torch

from liftdist.distributed.sharding import row_bounds


def test_rows_are_dealt_as_torch_does():
    for rows in range(1, 20):
        for shards in range(1, 9):
            chunks = [len(c) for c in torch.arange(rows).chunk(shards)]
            bounds = row_bounds(rows, shards)
            assert [b - a for a, b in itertools.pairwise(bounds)] == chunks + [0] * (shards - len(chunks))
