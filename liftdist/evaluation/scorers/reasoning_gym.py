"""The score of the reasoning-gym generator that made the question, which may have several right answers, and half-right ones.

What counts is what stands last in ``<answer>`` tags, if there are any, else the whole answer without blanks around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liftdist.evaluation import generators
from liftdist.evaluation.scorers import Scored
from liftdist.evaluation_settings import TaskConfig


class ReasoningGym:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def expected(self, text: str) -> str:
        return text  # empty, where the generator knows none beforehand

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        from reasoning_gym.utils import extract_answer

        said = extract_answer(answer) or answer.strip()
        try:
            return Scored(float(self._dataset.score_answer(said, record)), said or None)
        except Exception:  # some generators fail on what they cannot read
            return Scored(0.0, said or None)


def make(task: TaskConfig) -> ReasoningGym:
    return ReasoningGym(generators.dataset(task))
