"""Records metrics and texts of a run in ``metrics.jsonl`` and with the trackers that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from liftdist.redaction import redact
from liftdist.registry import TRACKERS


class Tracker(Protocol):
    """A destination of metrics. Each call may raise ``OSError``."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, tag: str, text: str) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Gallery(Protocol):
    """A tracker that shows images."""

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None: ...


class Recorder:
    """Records with trackers of :data:`liftdist.registry.TRACKERS`, on the main rank only.

    Args:
        names: trackers besides ``jsonl``; None on ranks that record nothing.
        after: the last step to keep of what earlier attempts recorded; later entries are removed. None keeps everything.
        say: called with a message when recording fails; training continues without metrics.
    """

    def __init__(
        self,
        run_dir: Path,
        names: Sequence[str] | None,
        after: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._say, self._failed = say, False
        started = () if names is None else (*names, "jsonl")  # the last, as the others read what it had recorded
        self._trackers: list[Tracker] = [TRACKERS.load(name).start(run_dir, after) for name in started]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._each(lambda tracker: tracker.scalars(step, values)):
            self._failed = False

    def text(self, tag: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(tag, redact(text)))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """``pixels`` ``[height, width, 3]`` uint8, with those trackers that show images."""
        self._each(lambda tracker: tracker.image(step, tag, pixels) if isinstance(tracker, Gallery) else None)

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, record: Callable[[Tracker], None]) -> bool:
        """Call ``record`` with each tracker; False if any failed. Of consecutive failures only the first is reported."""
        worked = True
        for tracker in self._trackers:
            try:
                record(tracker)
            except OSError as error:
                worked = False
                if not self._failed:
                    self._say(f"metrics cannot be recorded, training continues: {error}")
                self._failed = True
        return worked
