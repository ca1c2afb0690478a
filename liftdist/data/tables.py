"""Tables of records: Parquet and Arrow files. A row group, or a batch of an Arrow file, is in memory at a time."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liftdist import hub
from liftdist.data.reading import FileSource, Place, Record
from liftdist.errors import UserError

_ROWS = 256  # rows that are made into records at a time
_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti")  # features of the ``datasets`` library


def check_columns(name: str, columns: Iterable[str], features: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for columns that cannot be learned, or that have one name.

    Args:
        features: what the ``datasets`` library says of columns, as in its JSON.
    """
    columns = list(columns)
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise UserError(f"data {name}: two columns are named {twice[0]!r}")
    for column, feature in features.items():
        if found := next((kind for kind in _MEDIA if f'"_type": "{kind}"' in json.dumps(feature)), None):
            raise UserError(
                f"data {name}: column {column!r} holds {found.lower()}s, and only text can be learned; "
                f"remove it: dataset.remove_columns({column!r})"
            )


class TableSource(FileSource):
    """Rows of a table. Raises ``UserError`` if it is damaged, encrypted, or has columns that cannot be learned."""

    is_table = True

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        try:
            schema, self._length = self._described()
        except Exception as error:  # the library raises errors of many kinds
            raise self._damaged(error) from None
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        check_columns(self.name, schema.names, about.get("info", {}).get("features") or {})

    @abstractmethod
    def _described(self) -> tuple[Any, int]:
        """The schema, and the number of rows."""

    @abstractmethod
    def _batches(self, begin: int) -> Iterator[tuple[int, Any]]:
        """Batches of rows, with the number of the first, from the one on that holds row ``begin``."""

    def _rows(self, begin: int) -> Iterator[Any]:
        try:
            for first, batch in self._batches(begin):
                for start in range(max(begin - first, 0), len(batch), _ROWS):
                    part = batch.slice(start, _ROWS)
                    made = functools.cache(part.to_pylist)  # not of rows that are skipped
                    yield from ((made, row) for row in range(len(part)))
        except UserError:
            raise
        except Exception as error:
            raise self._damaged(error) from None

    def _record(self, index: int, row: tuple[Callable[[], list[Record]], int]) -> Place:
        made, number = row
        try:
            return f"{self.name}: record {index}", made()[number]
        except Exception as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return self.problem(
            f"data {self.name}", f"cannot be read: {getattr(error, 'strerror', None) or hub.first_line(error)}"
        )


class ParquetSource(TableSource):
    def _open(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False, page_checksum_verification=True)

    def _described(self) -> tuple[Any, int]:
        with self._open() as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._groups = [*itertools.accumulate(rows, initial=0)]  # the first row of each
            return file.schema_arrow, file.metadata.num_rows

    def _is_near(self, index: int, begin: int) -> bool:
        """A row group is read from its start."""
        return index >= self._groups[bisect.bisect_right(self._groups, begin) - 1]

    def _batches(self, begin: int) -> Iterator[tuple[int, Any]]:
        first = 0
        with self._open() as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > begin:
                    at = first
                    for batch in file.iter_batches(_ROWS, row_groups=[group], use_threads=False):
                        if at + len(batch) > begin:
                            yield at, batch
                        at += len(batch)
                first += rows


class ArrowSource(TableSource):
    """Arrow IPC: a file, or a stream as the ``datasets`` library writes it."""

    def _all(self) -> Iterator[Any]:
        """The schema, and all batches, memory-mapped."""
        import pyarrow

        with pyarrow.memory_map(str(self.path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(file)
                yield reader.schema
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(0)
                reader = pyarrow.ipc.open_stream(file)
                yield reader.schema
                yield from reader

    def _described(self) -> tuple[Any, int]:
        schema, *batches = ((part if number == 0 else len(part)) for number, part in enumerate(self._all()))
        return schema, sum(batches)

    def _batches(self, begin: int) -> Iterator[tuple[int, Any]]:
        parts = self._all()
        next(parts)
        first = 0
        for batch in parts:
            if first + len(batch) > begin:
                yield first, batch
            first += len(batch)
