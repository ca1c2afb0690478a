"""Question and answer, as two turns of a conversation; context follows the question after an empty line."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Conversation
from liftdist.data.records import exchange
from liftdist.data.sources import Record

FIELDS = ("question", "answer")
OPTIONAL = ("context", "history", *content.OPTIONAL)
RESPONSE = "answer"


def read(record: Record) -> Conversation:
    return exchange(record, "question", "answer", "context")
