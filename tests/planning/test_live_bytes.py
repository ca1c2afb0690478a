"""The count of live bytes."""

import torch

from liftdist.planning.live_bytes import LiveBytes


def test_live_bytes_follow_tensors_and_resized_storages():
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        assert live.now == 4000
        assert kept.view(10, 100).sum().item() == 0.0  # a view is no memory
        del kept
        assert (live.now, live.peak) == (0, 4004)
        held = torch.empty(500)
        held.untyped_storage().resize_(0)
        assert live.now == 0
        held.untyped_storage().resize_(2000)
        assert live.now == 2000
    assert torch.zeros(10).untyped_storage().resize_(80).nbytes() == 80
