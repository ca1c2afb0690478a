"""What a run records: figures and texts, by every tracker of :data:`liftdist.registry.TRACKERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from liftdist.redaction import redact
from liftdist.registry import TRACKERS


class Tracker(Protocol):
    """Where figures go. Each call may raise ``OSError``."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def text(self, tag: str, text: str) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Records by all trackers. Only the main rank does.

    Args:
        after: the step after which recording goes on; what an earlier attempt recorded beyond it is taken back. None: all.
        say: told when the disk takes no more. Training goes on without curves.
    """

    def __init__(
        self, run_dir: Path, enabled: bool, after: int | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._say, self._failed = say, False
        names = TRACKERS if enabled else ()
        self._trackers: list[Tracker] = [TRACKERS.load(name).start(run_dir, after) for name in names]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._each(lambda tracker: tracker.scalars(step, values)):
            self._failed = False

    def text(self, tag: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(tag, redact(text)))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, record: Callable[[Tracker], None]) -> bool:
        """Whether all trackers took it; the first failure in a row is told."""
        worked = True
        for tracker in self._trackers:
            try:
                record(tracker)
            except OSError as error:
                worked = False
                if not self._failed:
                    self._say(f"metrics cannot be recorded, training goes on: {error}")
                self._failed = True
        return worked
