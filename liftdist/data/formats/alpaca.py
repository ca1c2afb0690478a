"""Instruction, optional input, output, in the wording of Stanford Alpaca; LLM-Adapters' files have this form."""

from __future__ import annotations

from liftdist.data.records import text
from liftdist.data.sources import Record

FIELDS = ("instruction", "output")
WORDING = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def read(record: Record) -> tuple[str, str]:
    instruction, given = text(record, "instruction"), record.get("input") or ""
    if not isinstance(given, str):
        raise ValueError(f"'input' must be text, got {type(given).__name__}")
    prompt = WORDING.format(
        instruction=instruction,
        with_input=", paired with an input that provides further context" if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return prompt, text(record, "output")
