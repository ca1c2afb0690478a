import os

import pytest
from faulty_slurm import wrap


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """``faulty(command, shell code, times)``: the command runs that first, which may end it, as often as that."""
    folder = tmp_path / "faulty"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def make(command, code, times=1):
        wrap(folder, command, code, times)
        return lambda: len((folder / f"{command}.calls").read_text().splitlines())

    return make
