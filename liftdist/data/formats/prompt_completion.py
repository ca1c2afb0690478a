"""Prompt and completion, joined as they are: a space or newline between them must be part of the record."""

from __future__ import annotations

from liftdist.data.content import Text
from liftdist.data.records import text
from liftdist.data.sources import Record

FIELDS = ("prompt", "completion")


def read(record: Record) -> Text:
    return Text([(text(record, "prompt"), False), (text(record, "completion"), True)])
