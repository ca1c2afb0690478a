"""A list of messages, rendered by the tokenizer's chat template."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Conversation, conversation
from liftdist.data.sources import Record

FIELDS = ("messages",)
OPTIONAL = content.OPTIONAL
RESPONSE = None


def read(record: Record) -> Conversation:
    return conversation(record, record.get("messages"), "messages")
