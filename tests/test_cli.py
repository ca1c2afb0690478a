"""The command itself: what it lists and what it refuses."""

from commands import liftdist

from liftdist import schema_tree
from liftdist.schema import Config


def test_settings_are_listed_by_section():
    everything = liftdist("settings")
    for key, _ in schema_tree.settings(Config):
        assert f"\n{key}  (" in f"\n{everything}"
    section = liftdist("settings", "optimizer.")
    assert "optimizer.lr  (0.0002)\n    peak learning rate\n" in section
    assert "train.steps" not in section
    assert "settings nowhere: no such setting" in liftdist("settings", "nowhere", code=2)
