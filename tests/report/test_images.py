"""Pictures of the weights as images in TensorBoard, at each refresh and at the end of a run."""

import io
import re
import sys

import builders
import commands
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.report import figures


@pytest.fixture
def config(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    return commands.write_config(tmp_path, tiny_model, records, metrics=dict(images=True), train=dict(export=False))


def test_a_run_draws_at_each_refresh_and_at_its_end(config, tmp_path):
    """What ranks hold after the refresh before step 3 is drawn as what the checkpoint of step 4 holds."""
    run = commands.run_command("train", config, "--nproc", "2", "train.steps=4")
    assert run.returncode == 0, run.stdout
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert {"weights/Principal weights by rows", "weights/Overlap with magnitude", "weights/Singular values"} <= {*tags}
    markers = [[int(marker[at : at + 2], 16) for at in (1, 3, 5)] for marker in figures._VARIABLES]
    for tag in tags:
        *refreshed, image = events.Images(tag)
        of_selection = re.fullmatch("weights/Principal weights( by (rows|columns))?", tag)
        assert [earlier.step for earlier in refreshed] == ([3] if of_selection else [])
        assert all(earlier.encoded_image_string == image.encoded_image_string for earlier in refreshed)
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        assert image.step == 4
        assert pixels.shape == (image.height, image.width, 3)
        assert (pixels == 255).all(-1).mean() > 0.1  # the page is white
        assert ((pixels.max(-1) - pixels.min(-1)) > 60).mean() > 0.001  # and something is drawn on it
        assert not any((pixels == marker).all(-1).any() for marker in markers)


def test_images_that_cannot_be_drawn_are_refused(config, monkeypatch):
    with pytest.raises(
        UserError, match="metrics.images: are those of TensorBoard: add tensorboard to metrics.trackers"
    ):
        configs.load(config, ["metrics.trackers=[]"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"metrics.images: needs the library matplotlib: pip install 'liftdist\[report\]'"
    ):
        configs.load(config, [])
