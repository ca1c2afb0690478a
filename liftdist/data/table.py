"""Rows of Arrow batches, memory-mapped, in any order.

Indexed as a table of the datasets library is, whose import takes each rank more than a second of processor time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
Columns = dict[str, list[Any]]


class Table:
    """``table[3]`` is a row, its values by column; ``table[2:4]`` and ``table[[7, 0]]`` are columns, their values by row.

    Args:
        batches: of one schema.
        numbers: of the rows of all batches, those that the table has; all of them if None.
    """

    def __init__(self, batches: Sequence[pyarrow.RecordBatch], numbers: np.ndarray | None = None) -> None:
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        self._numbers: range | np.ndarray = range(self._stored) if numbers is None else numbers

    @property
    def _stored(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @classmethod
    def concat(cls, tables: Sequence[Table]) -> Table:
        """The rows of tables of one schema, one table after the other."""
        batches = [batch for table in tables for batch in table._batches]
        if all(isinstance(table._numbers, range) for table in tables):
            return cls(batches)
        before = np.cumsum([0, *(table._stored for table in tables[:-1])])
        numbers = [np.asarray(table._numbers) + offset for table, offset in zip(tables, before, strict=True)]
        return cls(batches, np.concatenate(numbers))

    def select(self, numbers: np.ndarray) -> Table:
        """The rows of these numbers, in their order, without a copy."""
        return Table(self._batches, numbers if isinstance(self._numbers, range) else self._numbers[numbers])

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int]) -> Columns: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice | Sequence):
            rows = [self[number] for number in (range(len(self))[key] if isinstance(key, slice) else key)]
            names = self._batches[0].schema.names if self._batches else ()
            return {name: [row[name] for row in rows] for name in names}
        number = self._numbers[index(key)]
        batch = int(np.searchsorted(self._ends, number, side="right"))
        found = self._batches[batch]
        at = int(number - self._ends[batch]) + len(found)
        return {name: column[at].as_py() for name, column in zip(found.schema.names, found.columns, strict=True)}

    def iter(self, batch_size: int) -> Iterator[Columns]:
        """All rows, so many at a time."""
        for begin in range(0, len(self), batch_size):
            yield self[begin : begin + batch_size]
