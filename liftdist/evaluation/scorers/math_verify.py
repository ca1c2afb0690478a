"""Mathematical equality by the library math-verify: fractions, roots, sets, intervals, matrices, equations, texts.

What counts is what the library takes from an answer: its boxed expressions (of several, all of them, as a set), else its last
formula, else its last number. An expected answer that has no delimiters is a formula, too: ``x^2`` is ``$x^2$``.

The library limits the time of each comparison to 5 s by SIGALRM, after which the answer is wrong. The limit stays, so that
figures are those of others who use it. It can be called on the main thread alone, and raises ``ValueError`` on another.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation_settings import TaskConfig

_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")


class MathVerify:
    def expected(self, text: str) -> str:
        from math_verify import parse

        formula = text if _DELIMITER.search(text) else f"${text.strip()}$"
        if not parse(formula):
            raise ValueError("holds nothing that math-verify reads")
        return formula

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        from math_verify import parse, verify

        with _timeouts() as late:
            said = parse(answer)  # the expression, and its text
            right = any(verify(parse(one), said) for one in expected)
        return Scored(float(right), str(said[-1]) if said else None, bool(late) and not right)


@contextlib.contextmanager
def _timeouts() -> Iterator[list[str]]:
    """What the library says of its limit within the context: for one of several comparisons it neither returns nor raises it."""
    found: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if is_late := record.levelno == logging.WARNING and str(record.msg).startswith("Timeout"):
            found.append(record.getMessage())
        return not is_late

    loggers = [logging.getLogger(f"math_verify.{module}") for module in ("parser", "grader")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def make(task: TaskConfig) -> MathVerify:
    return MathVerify()
