"""Whether an answer contains an expected one, which it may say among other words, in the same case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation.scorers.exact import Exact
from liftdist.evaluation_settings import TaskConfig


class Contains(Exact):
    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        found = next((one for one in expected if one in answer), None)
        return Scored(float(found is not None), found)


def make(task: TaskConfig) -> Contains:
    return Contains()
