"""What group 1 of ``pattern`` matches in an answer, the last time that it does, equal to an expected answer.

Of an expected answer the same is taken, if the pattern matches there, else all of it: both ``#### 18`` and ``18`` are right for
the pattern ``#### (-?[0-9]+)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation.scorers.exact import Exact
from liftdist.evaluation_settings import TaskConfig


class Regex(Exact):
    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def extract(self, answer: str) -> str | None:
        """What the group matched, without blanks around it; None if it took no part."""
        found = [match[1] for match in self._pattern.finditer(answer) if match[1] is not None]
        return found[-1].strip() if found else None

    def expected(self, text: str) -> str:
        return super().expected(self.extract(text) or text)

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        found = self.extract(answer)
        return Scored(float(found in expected), found)


def make(task: TaskConfig) -> Regex:
    assert task.pattern is not None  # its settings were validated
    return Regex(task.pattern)
