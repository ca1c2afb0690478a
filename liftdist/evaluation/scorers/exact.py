"""The whole answer, equal to an expected one apart from blanks around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation_settings import TaskConfig


class Exact:
    def expected(self, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty")
        return text.strip()

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        said = answer.strip()
        return Scored(float(said in expected), said or None)


def make(task: TaskConfig) -> Exact:
    return Exact()
