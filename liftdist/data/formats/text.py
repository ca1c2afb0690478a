"""A text, all of which is learned."""

from __future__ import annotations

from liftdist.data import records
from liftdist.data.content import Text
from liftdist.data.sources import Record

FIELDS = ("text",)
OPTIONAL = ()
RESPONSE = "text"


def read(record: Record) -> Text:
    return Text([(records.text(record, "text"), True)])
