"""Records as for ``alpaca``, in the wording that the authors of LIFT train with: blanks, ``<s>`` and all.

Their tokenizer puts its beginning of sequence before the text, also where it reads ``<s>`` as one, as Llama 2's does.
Their prompt in evaluations has one blank after ``request.``, and an empty line in place of the sixteen blanks.
"""

from __future__ import annotations

from liftdist.data.content import Text
from liftdist.data.records import optional_text, text
from liftdist.data.sources import Record

FIELDS = ("instruction", "output")
OPTIONAL = ("input",)
RESPONSE = "output"
PROMPT = (
    "<s> Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "### Instruction:\n{instruction}\n" + " " * 16 + "\n### Response:\n"
)


def read(record: Record) -> Text:
    instruction = text(record, "instruction")
    prompt = PROMPT.format(instruction=optional_text(record, "input") or instruction)
    return Text([(prompt, False), (text(record, "output").replace("</s>", "") + " ", True)], second_bos=True)
