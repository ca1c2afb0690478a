"""The largest scores, block by block."""

import pytest
import torch

from liftdist.engine import topk


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (252, 507), (507, 123), (123, 123)])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "denormals", "sampled rows large", "sampled rows zero"])
def test_top_k_is_a_stable_sort(shape, kind, monkeypatch):
    monkeypatch.setattr(topk, "BLOCK", 5000)  # the larger shapes have several blocks
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(shape, generator=generator)
    if kind == "ties":
        scores = (scores * 5).round()
    if kind == "zeros":
        scores = torch.where(scores < 0.9, 0.0, scores)
    if kind == "denormals":
        scores = scores * 1e-40
    if kind.startswith("sampled"):
        scores[:: max(1, shape[0] // topk.CANDIDATE_ROWS)] *= 100 if "large" in kind else 0
    for k in {0, 1, scores.numel() // 20, scores.numel() // 2, scores.numel()}:
        expected = scores.flatten().argsort(descending=True, stable=True)[:k].sort().values
        assert torch.equal(topk.top_k(lambda rows: scores[rows], scores.shape, k), expected)
