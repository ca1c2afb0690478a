"""How rows are dealt to shards."""

import itertools

import torch

from liftdist.distributed.rows import row_bounds
from liftdist.distributed.sharding import advice_on_padding, padding


def test_rows_are_dealt_as_torch_does():
    for rows in range(1, 20):
        for shards in range(1, 9):
            chunks = [len(c) for c in torch.arange(rows).chunk(shards)]
            bounds = row_bounds(rows, shards)
            assert [b - a for a, b in itertools.pairwise(bounds)] == chunks + [0] * (shards - len(chunks))


def test_experts_that_are_fewer_than_shards_are_padded():
    experts, other = (8, 100, 50), (4096, 10)
    assert padding([other], 64) == 1
    assert padding([experts], 64) == 8
    assert padding([experts, other, ()], 8) == 1
    assert advice_on_padding([experts, other], 1, 8) is None
    said = advice_on_padding([experts, other], 2, 64)
    assert "4.5 times the weights are gathered" in said
    assert said.endswith("mesh.dp_replicate=16 has 8 shards")
