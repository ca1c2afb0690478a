"""Parsing of records: fields, and detection of the format.

record -> format (liftdist/data/formats) -> content (liftdist/data/content.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liftdist.data.content import Content
from liftdist.data.sources import Record, Source, is_local, locations, open_source
from liftdist.errors import UserError
from liftdist.registry import FORMATS
from liftdist.schema import DataConfig

CHECKED_RECORDS = 1000  # records checked before ranks start


def text(record: Record, key: str) -> str:
    """The text in field ``key``. Raises ``ValueError`` if it is absent or not text."""
    if key not in record:
        raise ValueError(f"field {key!r} is missing (fields: {', '.join(map(str, record)) or 'none'})")
    if not isinstance(record[key], str):
        kind = "null" if record[key] is None else type(record[key]).__name__
        raise ValueError(f"{key!r} must be text, got {kind}")
    return record[key]


def detect_format(record: Record) -> str:
    """The format whose fields the record has. Raises ``ValueError`` if there is none."""
    known = {name: FORMATS.load(name).FIELDS for name in FORMATS}
    present = {field for field, value in record.items() if value is not None}  # tables have a null for an absent field
    for names in (present, set(record)):
        for name, fields in known.items():
            if names.issuperset(fields):
                return name
    expected = "; ".join("/".join(fields) for fields in known.values())
    raise ValueError(f"fields {', '.join(map(str, record)) or '(none)'} fit no format (known: {expected})")


def reader(source: Source, format: str) -> Callable[[Record], Content]:
    """The function that reads a record of ``source``; ``auto`` detects the format from the first record."""
    if format == "auto":
        where, first = next(source.read(0, 1))
        format = str(at(where, detect_format, first))
    read: Callable[[Record], Content] = FORMATS.load(format).read
    return read


def at(where: str, function: Callable[[Record], Any], record: Record) -> Any:
    """``function(record)``, with ``ValueError`` raised as a ``UserError`` that begins with the location ``where``."""
    try:
        return function(record)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_first_records(config: DataConfig) -> None:
    """Read the first records of local files as training does. Fast, without torch; hub data sets are skipped.

    Raises:
        UserError: naming file and line.
    """
    for path, revision in locations(config):
        if is_local(path):
            source = open_source(path, None, "train", revision)
            read = reader(source, config.format)
            for where, record in source.read(0, CHECKED_RECORDS):
                at(where, read, record)
