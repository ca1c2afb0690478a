"""The pictures of a run's weights as images in TensorBoard, ``weights/TITLE``.

at each refresh    where the principal weights lie, as ranks hold them
at the end         the same and how they changed, of the newest checkpoint

Imports matplotlib late: of several ranks one draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from liftdist.methods.base import Method
from liftdist.methods.lift import Lift
from liftdist.report import read, weights
from liftdist.report.weights import Weights
from liftdist.training.trackers import tensorboard

SECONDS = 60.0  # after which no further matrix is begun


def of_selection(method: Method, is_main: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Tags and pixels ``[height, width, 3]`` uint8, drawn as they are taken; none but on the main rank. The call is collective.

    Args:
        method: one that selects weights.
    """
    assert isinstance(method, Lift)
    found = weights.of_selection(method.principal)
    return _drawn(found, None) if is_main else iter(())


def _drawn(found: Weights, filter_rank: int | None) -> Iterator[tuple[str, np.ndarray]]:
    from liftdist.report import figures

    for picture in figures.of_weights(found, filter_rank):
        yield f"weights/{picture.title}", picture.pixels()


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
    for tag, pixels in _drawn(found, run.settings.get("selection.filter_rank")):
        tracker.image(found.step or 0, tag, pixels)
    tracker.close()
    return found.notes
