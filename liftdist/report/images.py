"""The pictures of a run's weights as images in TensorBoard, ``weights/TITLE``, at the step of its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from liftdist.report import figures, read, weights
from liftdist.training.trackers import tensorboard

SECONDS = 60.0  # after which no further matrix is begun


def write(run_dir: Path) -> list[str]:
    """Draw them. By one process that is not one of several ranks any more.

    Returns:
        What is left out, and why.

    Raises:
        OSError: they cannot be written.
        UserError: the run cannot be read.
    """
    run = read.read(run_dir)
    found = weights.of(run, None, SECONDS)
    tracker = tensorboard.start(run_dir, None)
    for picture in figures.of_weights(found, run.settings.get("selection.filter_rank")):
        tracker.image(found.step or 0, f"weights/{picture.title}", picture.pixels())
    tracker.close()
    return found.notes
