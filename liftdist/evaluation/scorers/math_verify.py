"""Mathematical equality by the library math-verify: fractions, roots, sets, intervals, matrices, equations, texts.

What counts is what the library takes from an answer: its boxed expressions (of several, all of them, as a set), else its last
formula, else its last number. An expected answer that has no delimiters is a formula, too: ``x^2`` is ``$x^2$``.

The library limits the time of each comparison by SIGALRM, after which the answer is wrong. So it can be called on the main thread
alone, and raises ``ValueError`` on another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

        said = parse(answer)  # the expression, and its text
        right = any(verify(parse(one), said) for one in expected)
        return Scored(float(right), str(said[-1]) if said else None)


def make(task: TaskConfig) -> MathVerify:
    return MathVerify()
