"""What all sources have in common, and how a file is read: forward.

A file is read from where the last reading ended, or from the nearest place before that is known: reading on is cheap, going
back may cost as much as reading from the start. Memory does not grow with the file.
"""

from __future__ import annotations

import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liftdist import digests
from liftdist.errors import UserError

_NAMED = 10  # files that are named to the user
_BEAT = 64  # rows between two calls of a source's ``beat``

Record = Mapping[str, Any]
Place = tuple[str, Record]  # the location of a record, for messages, and the record

#: What reading raises if a file, or its compression, is damaged or out of reach.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Source(ABC):
    """Records in a fixed order, each with its location for messages."""

    name: str  # in messages
    is_table = False  # whether records have null for what they do not have
    files: Sequence[str] = ()  # that were found, to be named to the user
    beat: Callable[[int], None] = staticmethod(lambda _: None)  # called while it is read, with the rows since then

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process: another opens the files itself."""
        return {name: value for name, value in vars(self).items() if name not in ("beat", "_cursor")}

    def watch(self, beat: Callable[[int], None]) -> None:
        """Have ``beat`` called while files are read, lines skipped or bytes hashed."""
        self.beat = beat

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, begin: int, end: int) -> Iterator[Place]:
        """The records from ``begin`` up to ``end``, fewer if there are fewer. Raises ``UserError``."""

    @abstractmethod
    def digest(self, cache_dir: Path) -> str:
        """A digest of the contents, cached in ``cache_dir``."""

    def place(self, where: str) -> str:
        """The part of a location that differs between records: a line, or "record N"."""
        return where.rpartition(":")[2].strip()

    def where(self, place: str) -> str:
        """The location that has this place."""
        return f"{self.name}{':' if place.isdigit() else ': '}{place}"

    def __bool__(self) -> bool:
        return next(iter(self.read(0, 1)), None) is not None


class FileSource(Source):
    """The records of one file.

    Args:
        name: of the file in messages; its path if not given.
    """

    digest_of = ""  # what decides the meaning of the file's bytes besides them
    _cursor: tuple[int, Iterator[Any]] | None = None  # the next row, and the rows from there

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)
        self._state = self._stat()
        self._length: int | None = None

    @abstractmethod
    def _rows(self, begin: int) -> Iterator[Any]:
        """What is read of the file for each record from ``begin`` on."""

    @abstractmethod
    def _record(self, index: int, row: Any) -> Place:
        """The record of a row. Raises ``UserError``."""

    def _known(self, begin: int) -> int:
        """The last row up to ``begin`` from which reading can start."""
        return begin

    def _is_near(self, index: int, begin: int) -> bool:
        """Whether reading on from row ``index`` to ``begin`` is no detour."""
        return index >= self._known(begin)

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self._guarded(0))
            self._check_unchanged()
        return self._length

    def __bool__(self) -> bool:
        return next(self._guarded(0), None) is not None

    def read(self, begin: int, end: int) -> Iterator[Place]:
        index, rows = self._cursor or (0, None)
        self._cursor = None
        if rows is None or index > begin or not self._is_near(index, begin):
            index = self._known(begin)
            rows = self._guarded(index)
        while index < end and (row := next(rows, None)) is not None:
            if index >= begin:
                yield self._record(index, row)
            index += 1
        self._check_unchanged()
        if index == end and index != self._length:  # else the file is at its end, and need not stay open
            self._cursor = index, rows

    def digest(self, cache_dir: Path) -> str:
        found = digests.of_file(self.path, cache_dir, lambda: self.beat(0))
        self._check_unchanged()
        return digests.of_parts([found, self.digest_of]) if self.digest_of else found

    def _guarded(self, begin: int) -> Iterator[Any]:
        self._check_unchanged()
        try:
            for number, row in enumerate(self._rows(begin)):
                if number % _BEAT == 0:
                    self.beat(_BEAT)
                yield row
        except BROKEN as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: Exception) -> UserError:
        return self.problem(f"data {self.name}", f"cannot be read: {getattr(error, 'strerror', None) or error}")

    def problem(self, where: str, reason: str) -> UserError:
        """The error to raise, unless the file has changed, which then is the reason."""
        self._check_unchanged()
        return UserError(f"{where}: {reason}")

    def _stat(self) -> tuple[int, int]:
        try:
            state = self.path.stat()
        except OSError as error:
            raise UserError(f"data {self.name}: {error.strerror or error}") from None
        return state.st_size, state.st_mtime_ns  # inode numbers are not stable on every file system

    def _check_unchanged(self) -> None:
        if self._stat() != self._state:
            raise UserError(f"data {self.name}: has changed while it was read; start again when it is complete")


class Joined(Source):
    """Several files of one kind, one after the other.

    Args:
        root: the folder that all are in. Their names there are a part of the digest: they decide the order, and places name them.
    """

    def __init__(self, sources: list[FileSource], root: str) -> None:
        self.sources, self._root = sources, root
        self.is_table = sources[0].is_table
        names = [self.place(source.name) for source in sources]
        self.files = names if len(names) <= _NAMED else [*names[:_NAMED], f"... ({len(names)} in all)"]

    def watch(self, beat: Callable[[int], None]) -> None:
        for source in self.sources:
            source.watch(beat)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __bool__(self) -> bool:
        return any(map(bool, self.sources))

    def read(self, begin: int, end: int) -> Iterator[Place]:
        for source in self.sources:
            if begin >= end:
                return
            if begin and begin >= len(source):  # a length takes a pass, and is not asked for where nothing is skipped
                begin, end = begin - len(source), end - len(source)
                continue
            taken = 0
            for place in source.read(begin, end):
                yield place
                taken += 1
            begin, end = 0, end - begin - taken

    def digest(self, cache_dir: Path) -> str:
        return digests.of_parts([[self.place(s.name), s.digest(cache_dir)] for s in self.sources])

    def place(self, where: str) -> str:
        return where.removeprefix(f"{self._root}{os.sep}")

    def where(self, place: str) -> str:
        return os.path.join(self._root, place)  # noqa: PTH118
