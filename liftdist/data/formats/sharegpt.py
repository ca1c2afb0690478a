"""ShareGPT conversations: a list of turns with from and value, rendered by the tokenizer's chat template."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Conversation, conversation
from liftdist.data.sources import Record

FIELDS = ("conversations",)
OPTIONAL = content.OPTIONAL
RESPONSE = None


def read(record: Record) -> Conversation:
    return conversation(record, record.get("conversations"), "conversations")
