"""Instruction and response, as two turns of a conversation; input or context follows the instruction after an empty line."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Conversation
from liftdist.data.records import exchange
from liftdist.data.sources import Record

FIELDS = ("instruction", "response")
OPTIONAL = ("input", "context", "history", *content.OPTIONAL)
RESPONSE = "response"


def read(record: Record) -> Conversation:
    return exchange(record, "instruction", "response", "input", "context")
