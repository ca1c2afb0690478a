"""The texts that the formats of records are read into."""

import builders

from liftdist.registry import FORMATS


def test_alpaca_wording():
    (prompt, _), (response, is_learned) = FORMATS.load("alpaca").read(builders.RECORDS["alpaca"]).pieces
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    record = {"instruction": "Add.", "output": "3", "answer": "3"}  # LLM-Adapters' extra field
    (prompt, _), _ = FORMATS.load("alpaca").read(record).pieces
    assert "Input" not in prompt
    assert (response, is_learned) == ("3", True)
