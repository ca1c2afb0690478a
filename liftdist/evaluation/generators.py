"""Questions that reasoning-gym generates (Stojanovski et al. 2025, arXiv:2505.24760): the same for the same seed and size."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from liftdist import digests
from liftdist.data.reading import Place, Source
from liftdist.errors import UserError
from liftdist.evaluation_settings import TaskConfig


def dataset(task: TaskConfig) -> Any:
    """The generator's data set. Raises ``UserError`` for an unknown generator, or arguments that it does not take."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task.generator not in DATASETS:
        near = difflib.get_close_matches(str(task.generator), DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"task {task.title}: reasoning-gym has no generator {task.generator}{hint}")
    try:
        return reasoning_gym.create_dataset(task.generator, seed=task.seed, size=task.size, **task.arguments)
    except (TypeError, ValueError, AssertionError) as error:  # by which generators refuse their arguments
        reason = " ".join(str(error).split()) or "they are out of its bounds"
        raise UserError(
            f"task {task.title}: generator {task.generator} does not take its arguments: {reason}"
        ) from None


class Generated(Source):
    """The questions of a task with a generator, as records with ``question`` and ``answer``, null where many are right."""

    def __init__(self, task: TaskConfig) -> None:
        self.name, self._dataset = f"reasoning_gym/{task.generator}", dataset(task)
        self._key = [task.generator, task.seed, task.size, task.arguments]

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, begin: int, end: int) -> Iterator[Place]:
        for number in range(begin, min(end, len(self))):
            yield f"{self.name}: record {number + 1}", self._dataset[number]

    def digest(self, cache_dir: Path) -> str:
        return digests.of_parts(self._key)
