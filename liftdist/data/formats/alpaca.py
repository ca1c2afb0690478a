"""Instruction, optional input, output, in the wording of Stanford Alpaca; the files of LLM-Adapters have this format."""

from __future__ import annotations

from liftdist.data.content import Text
from liftdist.data.records import text
from liftdist.data.sources import Record

FIELDS = ("instruction", "output")
WORDING = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def read(record: Record) -> Text:
    instruction, input_text = text(record, "instruction"), record.get("input") or ""
    if not isinstance(input_text, str):
        raise ValueError(f"'input' must be text, got {type(input_text).__name__}")
    prompt = WORDING.format(
        instruction=instruction,
        with_input=", paired with an input that provides further context" if input_text else "",
        input=f"### Input:\n{input_text}\n\n" if input_text else "",
    )
    return Text([(prompt, False), (text(record, "output"), True)])
