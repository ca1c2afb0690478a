"""The first of ``options`` in an answer.

A single letter counts in its own case, as ``a`` is an article; a word in any. Inside a longer word an option does not count,
neither the A of ``Answer`` nor the answer1 of ``answer10``, unless ``inside_words`` is set: it does with LLM-Adapters and LIFT's
authors (``run_math_parallel.py``, ``run_commonsense_parallel.py``), whose figures are of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation_settings import TaskConfig


@dataclass(frozen=True)
class Option:
    options: tuple[str, ...]
    inside_words: bool = False

    def extract(self, answer: str) -> str | None:
        """The option, as ``options`` has it."""
        by_length = sorted(self.options, key=len, reverse=True)  # where one begins like another
        within = "{}" if self.inside_words else r"(?<!\w){}(?!\w)"
        pattern = "|".join(f"({within.format(_pattern(option))})" for option in by_length)
        found = re.search(pattern, answer)
        return by_length[found.lastindex - 1] if found and found.lastindex else None

    def expected(self, text: str) -> str:
        for option in self.options:
            if re.fullmatch(_pattern(option), text.strip()):
                return option
        raise ValueError(f"is none of the options {', '.join(self.options)}")

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        option = self.extract(answer)
        return Scored(float(option in expected), option)


def make(task: TaskConfig) -> Option:
    return Option(tuple(task.options), task.inside_words)


def _pattern(option: str) -> str:
    return re.escape(option) if len(option) == 1 else f"(?i:{re.escape(option)})"
