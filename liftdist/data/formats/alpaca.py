"""Instruction, optional input, output, in the wording of Stanford Alpaca; the files of LLM-Adapters have this format.

A system prompt takes the place of the first paragraph. Earlier exchanges stand before the instruction and are not learned.
"""

from __future__ import annotations

from liftdist.data.content import Text
from liftdist.data.records import optional_text, pairs, text
from liftdist.data.sources import Record

FIELDS = ("instruction", "output")
OPTIONAL = ("input", "system", "history")
RESPONSE = "output"
TASK = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request."
)
WITH_INPUT = ", paired with an input that provides further context"
TURN = "### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
INPUT = "### Input:\n{input}\n\n"


def read(record: Record) -> Text:
    given = optional_text(record, "input")
    system = optional_text(record, "system") or TASK.format(with_input=WITH_INPUT if given else "")
    earlier = [TURN.format(instruction=asked, input="", output=answer) for asked, answer in pairs(record, "history")]
    last = TURN.format(
        instruction=text(record, "instruction"), input=INPUT.format(input=given) if given else "", output=""
    )
    return Text([("\n\n".join([system, *earlier, last]), False), (text(record, "output"), True)])
