"""Saves that fail in the middle of a run: a disk is told of and outlived, a bug is not."""

import errno
import json
import os
from pathlib import Path

import builders
import hooks
import pytest
import ranks

from liftdist.console import Console
from liftdist.runs import saver


def failing(mesh, config, error, steps):
    """One run whose second rank cannot write the checkpoints of some steps: how it ended, and what was said."""
    said = []

    def fail(path, *_):
        if mesh.rank == 1 and int(path.parent.name.split("-")[1]) in steps:
            raise error

    with (
        hooks.around(saver, "_write_file", before=fail),
        hooks.around(Console, "say", before=lambda _, message: said.append(message)),
    ):
        try:
            end = builders.run_once(mesh, config)
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
    return end, "\n".join(said)


@pytest.fixture
def config(tiny_model, tmp_path):
    return builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path,
        train=dict(steps=6, export=False), checkpoint=dict(interval=1, keep=9),
    )  # fmt: skip


def test_a_bug_in_saving_ends_the_run(config):
    """It passed for a failing disk before, and the run went on without checkpoints to its end."""
    ends = ranks.run(2, failing, config, TypeError("a bug of the saver's"), (3,))
    for end, _ in ends:
        assert "rank 1: saving failed: TypeError: a bug of the saver's" in end
        assert "_write_file" in end  # where it was raised
    step, _ = builders.files_of(Path(config.run_dir))
    assert step == 2


def test_a_disk_that_keeps_failing_is_said_louder_each_time(config):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
    (end, said), (other_end, _) = ranks.run(2, failing, config, full, (2, 3, 4))
    assert end == other_end == "finished"
    first = "CHECKPOINT FAILED, training continues: the disk: No space left on device"
    assert f"{first}; the newest checkpoint is step-00000001" in said
    assert "CHECKPOINT FAILED (2 in a row), training continues" in said
    assert "CHECKPOINT FAILED (3 in a row), training continues" in said
    assert "3 saves failed during this run; the last one succeeded" in said
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoint/failed"] for line in lines if "checkpoint/failed" in line] == [1.0, 2.0, 3.0]
    assert sorted(builders.accepted_in(Path(config.run_dir))) == [f"step-{n:08d}" for n in (1, 5, 6)]


def test_a_run_whose_last_save_fails_does_not_end_well(config):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
    for end, _ in ranks.run(2, failing, config, full, (5, 6)):
        assert "step 6 is not saved: the disk: No space left on device; the newest checkpoint is step-00000004" in end
