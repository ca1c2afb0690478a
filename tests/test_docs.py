"""What the documents say is so."""

import re
import shlex
from pathlib import Path

import pytest

from liftdist import config as configs
from liftdist import schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_settings_is_generated():
    table = README.split("<!-- settings:")[1].split("-->\n", 1)[1].split("\n<!-- end")[0]
    assert table.strip() == schema.settings_table().strip()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_starts_with_its_command(path):
    config, _ = configs.load(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# liftdist train configs/", "# liftdist submit configs/"))
    words = shlex.split(first[2:].split("    ")[0])
    assert f"configs/{path.name}" in words
    assert config.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", re.findall(r"^(liftdist/\w+\.py)", README, re.MULTILINE))
def test_named_files_exist(name):
    assert (ROOT / name).is_file()


def test_every_module_is_named():
    assert {p.name for p in (ROOT / "liftdist").glob("[a-z]*.py")} == {
        Path(name).name for name in re.findall(r"^(liftdist/\w+\.py)", README, re.MULTILINE)
    }
