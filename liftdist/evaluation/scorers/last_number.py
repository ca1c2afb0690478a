"""The last number of an answer, compared with the expected one within ``tolerance``.

The rule of LLM-Adapters (``evaluate.py``) and of LIFT's authors (``run_math_parallel.py``), who drop commas and take the last
``-?\\d+\\.?\\d*``, within 0.001. What they misread is read as it is meant:

- ``3/4`` and ``\\frac{3}{4}`` are one number, not 4;
- ``10-3`` ends with 3, not -3: after a digit, a letter or a closing bracket a minus sign is a subtraction;
- ``3 1/2`` and ``3\\frac{1}{2}`` are three and a half, ``\\frac12`` is a half;
- ``= - 5`` is -5: there is nothing to subtract from;
- ``.5`` is a half, not 5; ``1e-3`` a thousandth; the minus sign of typography (U+2212) is one, and so is a dash (U+2013);
- a comma belongs to ``1,234``, as in LaTeX's ``1{,}234`` and ``1\\,234``, but stands between two numbers in ``1, 234``.

Units, currencies and percent signs are left aside: ``$1,234.50`` is 1234.5, and ``50%`` is 50. Not read as one number are powers
(``10^3`` ends with 3), times (``12:30`` with 30), and digits in groups by blanks (``5 000`` with 0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Any

from liftdist.evaluation.scorers import Scored
from liftdist.evaluation_settings import TaskConfig

_SIGN = r"(?P<sign>(?:(?<![\w)\]}])-\$?|\$-)?)"
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d{1,4}(?!\w))?"
_DIVISOR = rf"(?=[\d.,]*[1-9]){_DECIMAL}"  # not zero
_NUMBER = re.compile(
    rf"{_SIGN}(?:\\[dt]?frac\{{(?P<above>-?{_DECIMAL})\}}\{{(?P<below>{_DIVISOR})\}}"
    rf"|(?P<over>{_DECIMAL})(?:/(?P<under>{_DIVISOR}))?)"
)
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))")
_SHORT_FRACTION = re.compile(r"(\\[dt]?frac)(\d)(\d)")
_SIGN_APART = re.compile(r"(=\s*-)\s+(?=[\d.$\\])")
_MIXED = re.compile(
    r"(?<![\w.,/^])(\d{1,9})(?: (\d{1,9})/(\d{1,9})(?!\.?\w|/)| ?\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\})"
)
_EXACT = Context(prec=100_000)  # digits: more than an answer has


@dataclass(frozen=True)
class LastNumber:
    tolerance: float

    def extract(self, answer: str) -> str | None:
        """The last number, a decimal without commas or a fraction of two."""
        found = list(_NUMBER.finditer(_normalised(answer)))
        return _plain(found[-1]) if found else None

    def expected(self, text: str) -> str:
        if (number := self.extract(text)) is None:
            raise ValueError("holds no number")
        return number

    def score(self, answer: str, expected: Sequence[str], record: Mapping[str, Any]) -> Scored:
        number = self.extract(answer)
        if number is None:
            return Scored(0.0, None)
        tolerance = Decimal(str(self.tolerance))
        return Scored(float(any(_are_near(number, one, tolerance) for one in expected)), number)


def make(task: TaskConfig) -> LastNumber:
    return LastNumber(task.tolerance)


def _plain(match: re.Match[str]) -> str:
    over, under = match["over"] or match["above"], match["under"] or match["below"]
    number = f"{over}/{under}" if under else over
    return (f"-{number}" if "-" in match["sign"] else number).replace(",", "").replace("--", "")


def _normalised(answer: str) -> str:
    """With one way to write each number."""
    text = answer.replace("\u2212", "-").replace("\u2013", "-")
    text = _SHORT_FRACTION.sub(r"\1{\2}{\3}", _LATEX_COMMA.sub(",", text))
    return _MIXED.sub(_improper, _SIGN_APART.sub(r"\1", text))


def _improper(match: re.Match[str]) -> str:
    """The fraction that a mixed number is; two numbers, if what follows the first is no part of one."""
    whole, above, below = (int(digits) for digits in match.groups() if digits is not None)
    return f"{whole * below + above}/{below}" if above < below else match[0]


def _are_near(one: str, other: str, tolerance: Decimal) -> bool:
    """Exactly: with floats, what differs by the tolerance might seem to differ by more."""
    (above, below), (over, under) = _parts(one), _parts(other)
    with localcontext(_EXACT):
        return abs(above * under - over * below) <= tolerance * abs(below * under)


def _parts(number: str) -> tuple[Decimal, Decimal]:
    over, _, under = number.partition("/")
    return Decimal(over), Decimal(under or 1)
