"""Ascending indices as coded gaps."""

import numpy as np
import pytest
import torch

from liftdist.deltas import codec


@pytest.mark.parametrize("indices", [
    [], [0], [127], [128], [2**31 + 5], [0, 1, 2, 3], [5, 132, 133, 16_517, 2**35, 2**35 + 127, 2**62],
    np.cumsum(np.random.default_rng(0).geometric(0.01, 5000)).tolist(),
])  # fmt: skip
def test_gaps_hold_any_ascending_indices(indices):
    coded = codec.encode(torch.tensor(indices, dtype=torch.int64))
    assert coded.dtype == torch.uint8
    assert coded.numel() % 8 == 0
    assert codec.decode(coded, len(indices)).tolist() == indices
