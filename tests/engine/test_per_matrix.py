"""How many weights of a matrix are principal."""

import pytest

from liftdist.engine.budgets.per_matrix import PerMatrix


def test_budget():
    assert PerMatrix(0.05, None).allot({"w": (30, 50)})["w"] == 75
    assert PerMatrix(None, 8).allot({"w": (30, 50)})["w"] == 640
    assert PerMatrix(None, 128).allot({"w": (30, 50)})["w"] == 1500
    with pytest.raises(ValueError, match="exactly one"):
        PerMatrix(0.05, 8).allot({"w": (30, 50)})["w"]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.01, float("nan")])
def test_density_is_a_share(density):
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        PerMatrix(density, None).allot({"w": (30, 50)})["w"]


@pytest.mark.parametrize("rank", [0, -1])
def test_a_budget_rank_is_at_least_one(rank):
    with pytest.raises(ValueError, match="budget_rank must be at least 1"):
        PerMatrix(None, rank)
