"""Scorers of generated answers, one per file: ``make(task)`` returns a :class:`Scorer`. Must not know models.

:data:`liftdist.registry.SCORERS` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Scored(NamedTuple):
    """How right an answer is, 0 to 1, and what was taken from it; None if it holds nothing of the kind."""

    score: float
    extracted: str | None
    timed_out: bool = False  # it is taken for wrong because to compare it took too long


class Scorer(Protocol):
    """Compares what a model answered with what is expected."""

    def expected(self, text: str) -> str:
        """The form in which an expected answer is compared. Raises ``ValueError`` if no answer could ever equal it."""

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        """How right ``answer`` is.

        Args:
            expected: what :meth:`expected` made of each answer that is right.
            record: that the question was made of.
        """
