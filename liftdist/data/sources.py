"""Sources of records: a local file or a hub data set.

A source has a number of records and a digest of its contents, and reads any range of records, each with its location for error
messages. A JSON Lines file is indexed only as far as records are requested: the first ones of a large file are available at once.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liftdist import digests
from liftdist.errors import UserError

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

Record = Mapping[str, Any]


class JsonlSource:
    """One JSON object per line; only line offsets are held in memory. Empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers, self._offsets = array("q"), array("q")  # line number and byte offset of each record
        self._line = self._scanned = 0  # lines and bytes indexed so far
        self._complete = False

    def _index(self, end: int | None = None) -> None:
        """Index the first ``end`` records, or all."""
        if self._complete or (end is not None and len(self._offsets) >= end):
            return
        with self.path.open("rb") as file:
            file.seek(self._scanned)
            for line in file:
                self._line += 1
                if line.strip():
                    self._numbers.append(self._line)
                    self._offsets.append(self._scanned)
                self._scanned += len(line)
                if end is not None and len(self._offsets) >= end:
                    return
        self._complete = True

    def __bool__(self) -> bool:
        self._index(1)
        return bool(self._offsets)

    def __len__(self) -> int:
        self._index()
        return len(self._offsets)

    def digest(self, cache_dir: Path) -> str:
        return digests.of_file(self.path, cache_dir)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        self._index(end)
        with self.path.open("rb") as file:
            for number, offset in zip(self._numbers[begin:end], self._offsets[begin:end], strict=True):
                file.seek(offset)
                where = f"{self.path}:{number}"
                try:
                    record = json.loads(file.readline())
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    reason = getattr(error, "msg", None) or str(error)
                    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                    raise UserError(f"{where}: not JSON: {reason}{column}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: must be a JSON object, got {type(record).__name__}")
                yield where, record


class ListSource:
    """Records in memory or memory-mapped: a JSON array, or a data set of the ``datasets`` library.

    Args:
        source: the file they were read from, or the fingerprint of the data set.
    """

    def __init__(self, name: str, records: Any, source: Path | str) -> None:
        self.name, self.records, self._source = name, records, source

    def digest(self, cache_dir: Path) -> str:
        return self._source if isinstance(self._source, str) else digests.of_file(self._source, cache_dir)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        for index in range(begin, min(end, len(self.records))):
            record = self.records[index]
            if not isinstance(record, dict):
                raise UserError(f"{self.name}: record {index}: must be an object, got {type(record).__name__}")
            yield f"{self.name}: record {index}", record


Source = JsonlSource | ListSource


def is_local(path: str) -> bool:
    return Path(path).suffix in LOCAL_SUFFIXES or path.startswith((".", "/", "~")) or Path(path).exists()


def open_source(path: str, subset: str | None, split: str) -> Source:
    """The source of a path or hub name.

    Raises:
        UserError: it is missing, unreadable, empty or of an unknown kind.
    """
    if not is_local(path):
        return _open_hub(path, subset, split)
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data {path}: " + ("is a folder; name a file in it" if file.is_dir() else "no such file"))
    if file.suffix not in LOCAL_SUFFIXES:
        raise UserError(f"data {path}: must end in {', '.join(LOCAL_SUFFIXES)}")
    try:
        source: Source
        if file.suffix == ".jsonl":
            source = JsonlSource(file)
        elif file.suffix == ".parquet":
            source = ListSource(path, _load_dataset("parquet", data_files=str(file), split="train"), file)
        else:
            source = _open_json(file)
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}") from None
    if not source:
        raise UserError(f"data {path}: holds no record")
    return source


def _open_json(file: Path) -> Source:
    """A JSON array of objects; files with one object per line often have this suffix, too."""
    with file.open("rb") as stream:
        if stream.read(4096).lstrip()[:1] != b"[":
            return JsonlSource(file)
    try:
        return ListSource(str(file), json.loads(file.read_bytes()), file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}{line}: not JSON: {getattr(error, 'msg', error)}") from None


def _open_hub(path: str, subset: str | None, split: str) -> Source:
    records = _load_dataset(path, subset, split=split)
    if not len(records):
        raise UserError(f"data {path}: split {split} holds no record")
    return ListSource(f"{path}[{split}]", records, str(records._fingerprint))


def _load_dataset(*args: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:  # the library raises errors of many kinds
        name = options.get("data_files", args[0])
        raise UserError(f"data {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def remember_digests(paths: Iterable[str | None], cache_dir: Path) -> None:
    """Hash local files and cache their digests for the ranks of this machine. Raises ``UserError`` like :func:`open_source`."""
    for path in paths:
        if path is not None and is_local(path):
            open_source(path, None, "train").digest(cache_dir)
