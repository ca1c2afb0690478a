"""Names in and of run directories."""

from pathlib import Path

from liftdist.runs import layout


def test_a_fresh_start_takes_the_next_free_name(tmp_path):
    assert layout.next_free(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    assert layout.next_free(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run" / "file").touch()
    (tmp_path / "run-2").touch()
    assert layout.next_free(tmp_path / "run") == tmp_path / "run-3"
    assert Path(tmp_path / "run" / "file").exists()
