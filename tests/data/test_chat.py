"""What is learned of a record: the response, and the end of each turn."""

import builders
import pytest

from liftdist.data import records
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation
from liftdist.registry import FORMATS


def learned_text(content, tokenizer):
    ((ids, learned),) = Encoder(tokenizer)(content)
    return tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])


@pytest.mark.parametrize("name", builders.RECORDS)
def test_formats_learn_the_response_and_the_end_only(name, tokenizer):
    assert records.detect_format(builders.RECORDS[name]) == name
    text = learned_text(FORMATS.load(name).read(builders.RECORDS[name]), tokenizer)
    assert (
        text.rstrip("\n") == "3<|im_end|>"
    )  # pad and end are the same token here, and the end is learned all the same
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_every_turn_of_the_assistant_is_learned(tokenizer):
    turns = [("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned_text(Conversation(messages), tokenizer).replace("\n", "") == "one<|im_end|>two<|im_end|>"


def test_an_opening_by_the_assistant_is_not_learned(tokenizer):
    turns = [("assistant", "hello"), ("user", "1+2"), ("assistant", "3")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned_text(Conversation(messages), tokenizer).rstrip() == "3<|im_end|>"
