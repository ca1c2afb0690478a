"""How many weights of a matrix are principal."""

import pytest

from liftdist.engine.matrices import budget


def test_budget():
    assert budget((30, 50), 0.05, None) == 75
    assert budget((30, 50), None, 8) == 640
    assert budget((30, 50), None, 128) == 1500
    with pytest.raises(ValueError, match="exactly one"):
        budget((30, 50), 0.05, 8)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.01, float("nan")])
def test_density_is_a_share(density):
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        budget((30, 50), density, None)
