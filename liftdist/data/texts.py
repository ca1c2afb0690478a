"""Text files of records: JSON Lines, a JSON array, or rows of cells (CSV, TSV); as they are, or compressed."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from liftdist.data import json_text
from liftdist.data.json_text import MAX_RECORD
from liftdist.data.reading import BROKEN, FileSource, Place, Record
from liftdist.errors import UserError

_STRIDE = 1024  # records between two places that are remembered
_BOMS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def _zstd(path: Path) -> BinaryIO:
    import pyarrow  # has the codec on every version of Python

    if not pyarrow.Codec.is_available("zstd"):
        raise OSError("this pyarrow is built without zstd; decompress the file: zstd -d")
    return io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))


#: Compressions by suffix.
OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


class TextSource(FileSource):
    """A text file. Raises ``UserError`` if it is in another encoding than UTF-8."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        head = self.head(4)
        known = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
        if known is None and len(head) == 4 and head[0] and head[1::2] == b"\0\0":
            known = "UTF-16"  # without a mark: every other byte of ASCII text is zero
        if known:
            raise UserError(f"data {self.name}: is {known}; convert it: iconv -f {known} -t UTF-8")

    def _open(self) -> BinaryIO:
        return cast(BinaryIO, OPEN.get(self.path.suffix.lower(), lambda path: path.open("rb"))(self.path))

    def head(self, size: int) -> bytes:
        """The first bytes of the text. Raises ``UserError`` if it cannot be read."""
        try:
            with self._open() as stream:
                return stream.read(size)
        except BROKEN as error:
            raise self.unreadable(error) from None

    @property
    def _is_compressed(self) -> bool:
        return self.path.suffix.lower() in OPEN


class Line(NamedTuple):
    """Where a record begins, and what is read of it."""

    number: int
    offset: int
    text: Any  # a line as bytes, or cells


class _Lines:
    """The lines of a stream from an offset on. Raises ``UserError`` for one that is too long to be a record."""

    def __init__(self, stream: BinaryIO, name: str, number: int, offset: int) -> None:
        self.number, self.offset = number, offset  # lines and bytes before the next line
        self._read, self._name = stream.readline, name

    def __iter__(self) -> Iterator[bytes]:
        while line := self._read(MAX_RECORD + 1):
            if len(line) > MAX_RECORD:
                raise UserError(
                    f"{self._name}:{self.number + 1}: the line has more than {MAX_RECORD >> 20} MiB; "
                    "a record ends with its line"
                )
            self.number += 1
            self.offset += len(line)
            yield line


class LineSource(TextSource):
    """Records of one or more lines each. Every 1024th is remembered by its offset, if the file is not compressed."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        self._marks = [(0, 0)]  # line number and offset

    def _known(self, begin: int) -> int:
        return min(begin // _STRIDE, len(self._marks) - 1) * _STRIDE

    def _rows(self, begin: int) -> Iterator[Line]:
        number, offset = self._marks[begin // _STRIDE]
        with self._open() as stream:
            if offset:
                stream.seek(offset)
            index = begin
            for line in self._lines(_Lines(stream, self.name, number, offset)):
                if index == len(self._marks) * _STRIDE and not self._is_compressed:
                    self._marks.append((line.number - 1, line.offset))
                yield line
                index += 1

    @abstractmethod
    def _lines(self, lines: _Lines) -> Iterator[Line]:
        """The beginning and the text of each record."""

    def _record(self, index: int, row: Line) -> Place:  # noqa: ARG002
        where = f"{self.name}:{row.number}"
        try:
            return where, self._parse(row.text)
        except ValueError as error:
            raise self.problem(where, str(error)) from None

    @abstractmethod
    def _parse(self, text: Any) -> Record: ...


class JsonlSource(LineSource):
    """One JSON object per line. Empty lines are skipped."""

    def _lines(self, lines: _Lines) -> Iterator[Line]:
        offset = lines.offset
        for line in lines:
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield Line(lines.number, offset, line)
            offset = lines.offset

    def _parse(self, text: bytes) -> Record:
        value = json_text.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"must be a JSON object, got {_kind(value)}")
        return value


class ArraySource(TextSource):
    """A JSON array of objects, of which a few are in memory at a time."""

    def _known(self, begin: int) -> int:  # noqa: ARG002
        return 0

    def _rows(self, begin: int) -> Iterator[Any]:  # noqa: ARG002
        with self._open() as stream:
            items = json_text.Array(stream)
            try:
                yield from ((item,) for item in items)
            except ValueError as error:
                raise self.problem(f"{self.name}:{items.line}", str(error)) from None

    def _record(self, index: int, row: tuple[Any]) -> Place:
        where = f"{self.name}: record {index}"
        if not isinstance(row[0], dict):
            raise UserError(f"{where}: must be an object, got {_kind(row[0])}")
        return where, row[0]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def json_source(path: Path, name: str | None = None) -> TextSource:
    """JSON Lines or a JSON array, whatever the suffix: files of either kind have both."""
    lines = JsonlSource(path, name)
    begin = lines.head(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return ArraySource(path, name) if begin.startswith(b"[") else lines


class CsvSource(LineSource):
    """Rows of cells under a row of names. All values are text; an empty cell is null. Empty lines are skipped."""

    is_table = True
    delimiter = ","
    digest_of = "cells between commas"

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        self._names: list[str] = []

    def _lines(self, lines: _Lines) -> Iterator[Line]:
        csv.field_size_limit(MAX_RECORD)  # of the process
        begin, offset, size = lines.number, lines.offset, 0
        names_come = offset == 0

        def texts() -> Iterator[str]:
            nonlocal size
            for line in lines:
                size += len(line)
                if size > MAX_RECORD:
                    raise ValueError(f"a cell has more than {MAX_RECORD >> 20} MiB; is a quote not closed?")
                text = json_text.decoded(line)
                yield text.removeprefix("\ufeff") if lines.number == 1 else text

        rows = csv.reader(texts(), delimiter=self.delimiter, strict=True)
        try:
            for row in rows:
                if row and names_come:
                    self._names, names_come = self._header(row), False
                elif row:
                    yield Line(begin + 1, offset, row)
                begin, offset, size = lines.number, lines.offset, 0
        except (csv.Error, ValueError) as error:
            at = lines.number if isinstance(error, ValueError) and size <= MAX_RECORD else begin + 1
            reason = str(error)
            if "unexpected end of data" in reason:
                reason = "a quote that begins in this row is not closed"
            elif "new-line character" in reason:
                reason = "lines end with a carriage return alone; convert the file: tr '\\r' '\\n'"
            elif isinstance(error, csv.Error):
                reason += "; a quote inside a quoted cell is written twice"
            raise self.problem(f"{self.name}:{at}", reason) from None

    def _header(self, cells: list[str]) -> list[str]:
        names = [name or f"Unnamed: {number}" for number, name in enumerate(cells)]  # as pandas calls its index
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two columns are named {twice!r}")
        other = next((mark for mark in ";\t|," if mark != self.delimiter and mark in names[0]), None)
        if len(names) == 1 and other is not None:
            raise ValueError(
                f"one column, named {names[0]!r}: cells are separated by {self.delimiter!r} in a file of this suffix, "
                f"not by {other!r}"
            )
        return names

    def _parse(self, text: list[str]) -> Record:
        if len(text) != len(self._names):
            raise ValueError(f"has {len(text)} cells, and the first row names {len(self._names)} columns")
        return {name: cell or None for name, cell in zip(self._names, text, strict=True)}


class TsvSource(CsvSource):
    """The same with tabs between cells."""

    delimiter = "\t"
    digest_of = "cells between tabs"
