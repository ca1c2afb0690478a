"""Tables of records: Parquet and Arrow files. A row group, or a batch of an Arrow file, is in memory at a time."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liftdist import hub
from liftdist.data.reading import FileSource, Place
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
                    yield from batch.slice(start, _ROWS).to_pylist()
        except UserError:
            raise
        except Exception as error:
            raise self._damaged(error) from None

    def _record(self, index: int, row: Any) -> Place:
        return f"{self.name}: record {index}", row

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
            return file.schema_arrow, file.metadata.num_rows

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
