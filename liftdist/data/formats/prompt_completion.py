"""Prompt and completion: two texts, joined as they are, or two lists of messages; the completion's replies are learned."""

from __future__ import annotations

from liftdist.data import content
from liftdist.data.content import Content, Text, conversation
from liftdist.data.records import text
from liftdist.data.sources import Record

FIELDS = ("prompt", "completion")
OPTIONAL = content.OPTIONAL  # of lists of messages
RESPONSE = "completion"


def read(record: Record) -> Content:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) != isinstance(completion, list) and {"prompt", "completion"} <= record.keys():
        raise ValueError("'prompt' and 'completion' must both be texts, or both lists of messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation(record, prompt + completion, "prompt + completion", len(prompt))
    if given := [name for name in OPTIONAL if record.get(name)]:
        raise ValueError(f"{given[0]!r} goes with 'prompt' and 'completion' that are lists of messages, not with texts")
    return Text([(text(record, "prompt"), False), (text(record, "completion"), True)])
