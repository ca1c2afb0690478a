"""Compressions of a delta, one per file, see :data:`liftdist.registry.COMPRESSIONS`.

``plan(changes, *, ...)`` is given the changes of all tensors, one at a time, with base values, and returns what maps the name and
the change of a tensor to its :class:`liftdist.deltas.difference.Difference` and the scale of its steps, None if it is exact. Its
keywords are options of the command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from liftdist.deltas.delta import Change
from liftdist.deltas.difference import Difference

Changes = Callable[[], Iterable[tuple[str, Change]]]  # may be asked for more than once
Coding = Callable[[str, Change], tuple[Difference, float | None]]
