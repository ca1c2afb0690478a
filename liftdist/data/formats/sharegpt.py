"""ShareGPT conversations: a list of turns with from and value, rendered by the tokenizer's chat template."""

from __future__ import annotations

from liftdist.data.records import chat
from liftdist.data.sources import Record

FIELDS = ("conversations",)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read(record: Record) -> list[dict[str, str]]:
    return chat(record, "conversations", "from", "value", ROLES)
