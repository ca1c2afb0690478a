"""A list of messages with role and content, rendered by the tokenizer's chat template."""

from __future__ import annotations

from liftdist.data.records import chat
from liftdist.data.sources import Record

FIELDS = ("messages",)
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}


def read(record: Record) -> list[dict[str, str]]:
    return chat(record, "messages", "role", "content", ROLES)
