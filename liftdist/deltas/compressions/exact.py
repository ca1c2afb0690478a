"""All of a delta, to the bit: of each weight the difference of bits between new value and base value.

Most differences are small numbers, which deflate well; base values are not kept, for the base model has them.
"""

from __future__ import annotations

from liftdist.deltas import difference
from liftdist.deltas.compressions import Changes, Coding


def plan(changes: Changes) -> Coding:
    return lambda _, change: (difference.exact(change), None)
