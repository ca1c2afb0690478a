"""What a run records as it goes."""

import json

import builders
import pytest

from liftdist.training.recorder import Recorder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_curves_and_no_more(small_disk):
    said = []
    recorder = Recorder(small_disk, ["tensorboard"], None, said.append)
    for step in range(1, 4):
        recorder.scalars(step, {"train/loss": 1.0})
    filler = builders.fill(small_disk)
    for step in range(4, 400):
        recorder.scalars(step, {"train/loss": 1.0, "a/" + "long" * 20: 2.0})
    filler.unlink()
    for step in range(400, 403):
        recorder.scalars(step, {"train/loss": 1.0})
    recorder.close()
    assert len(said) == 1
    assert "metrics cannot be recorded, training continues: [Errno 28]" in said[0]
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[-3:]] == [400, 401, 402]
