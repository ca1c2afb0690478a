"""Prompt and response, as two turns of a conversation."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Conversation
from liftdist.data.records import exchange
from liftdist.data.sources import Record

FIELDS = ("prompt", "response")
OPTIONAL = ("history", *content.OPTIONAL)
RESPONSE = "response"


def read(record: Record) -> Conversation:
    return exchange(record, "prompt", "response")
