"""The contents that the formats of records are read into, worked out by hand."""

import pytest
from commands import ROOT

from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation, Text
from liftdist.registry import FORMATS

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request."
)
LIFT = (
    "<s> Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "### Instruction:\nAdd.\n                \n### Response:\n"
)
TOOL = {"type": "function", "function": {"name": "add"}}


def learned(prompt, response):
    return Text([(prompt, False), (response, True)])


def chat(*said, masked=(), tools=None, arguments=None, system=None):
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]
    first = [{"role": "system", "content": system}] if system else []
    return Conversation(first + messages, tools, arguments or {}, frozenset(masked))


def turns(*said):
    return chat(*said).messages


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        (
            "alpaca",
            {"instruction": "Add.", "output": "3", "answer": "3"},
            learned(f"{ALPACA}\n\n### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            learned(f"{ALPACA_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
        ),
        (
            "alpaca",
            {"instruction": "{Add} %s {{input}}", "input": "", "output": " {x}\n"},
            learned(f"{ALPACA}\n\n### Instruction:\n{{Add}} %s {{{{input}}}}\n\n### Response:\n", " {x}\n"),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 {2}", "system": "You {can} add.", "output": "3", "history": None},
            learned("You {can} add.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n", "3"),
        ),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3", "system": None, "history": [["Hi", "Yes?"], ["1+1", "2"]]},
            learned(
                f"{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\n1+1\n\n### Response:\n2\n\n"
                "### Instruction:\nAdd.\n\n### Response:\n",
                "3",
            ),
        ),
        ("lift_paper", {"instruction": "Add.", "output": "3", "answer": "3"}, learned(LIFT, "3 ")),
        ("lift_paper", {"instruction": "Add.", "input": "", "output": "3\n"}, learned(LIFT, "3\n ")),
        ("lift_paper", {"instruction": "Solve.", "input": "Add.", "output": "3</s>"}, learned(LIFT, "3 ")),
        ("prompt_completion", {"prompt": " 1+2=", "completion": "\n3 "}, learned(" 1+2=", "\n3 ")),
        ("prompt_completion", {"prompt": "", "completion": "3", "tools": None, "label": True}, learned("", "3")),
        (
            "prompt_completion",
            {"prompt": turns("1+2"), "completion": [{"role": "assistant", "content": "3"}]},
            chat("1+2", "3"),
        ),
        (
            "prompt_completion",
            {"prompt": turns("1+1", "2", "1+2"), "completion": turns("", "3")[1:]},
            chat("1+1", "2", "1+2", "3", masked=[1]),
        ),
        (
            "prompt_completion",
            {
                "prompt": turns("1+1", "2", "1+2"),
                "completion": turns("", "3", "Sure?", "Yes")[1:],
                "system": "Add.",
                "tools": [TOOL],
            },
            chat("1+1", "2", "1+2", "3", "Sure?", "Yes", masked=[2], system="Add.", tools=[TOOL]),
        ),
        ("prompt_completion", {"prompt": [], "completion": turns("1+2", "3")}, chat("1+2", "3")),
        ("question_answer", {"question": "1+2", "answer": "3"}, chat("1+2", "3")),
        ("question_answer", {"question": "Sum?", "context": "1 2", "answer": "3", "id": 7}, chat("Sum?\n\n1 2", "3")),
        (
            "question_answer",
            {"question": "1+2", "answer": "3", "system": "Add.", "history": [["1+1", "2"]], "context": None},
            chat("1+1", "2", "1+2", "3", masked=[2], system="Add."),
        ),
        (
            "instruction_response",
            {"instruction": "Add.", "context": "1 2", "response": "3", "category": "x"},
            chat("Add.\n\n1 2", "3"),
        ),
        (
            "instruction_response",
            {"instruction": "Add.", "input": "1 2", "context": "", "response": "3"},
            chat("Add.\n\n1 2", "3"),
        ),
        ("prompt_response", {"prompt": "1+2\n", "response": " 3"}, chat("1+2\n", " 3")),
        (
            "prompt_response",
            {"prompt": "1+2", "response": "3", "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
            chat("1+2", "3", tools=[TOOL], arguments={"a": 1}),
        ),
        ("text", {"text": " 1+2=3\n"}, Text([(" 1+2=3\n", True)])),
    ],
)
def test_contents(format, record, expected):
    made = FORMATS.load(format).read(record)
    assert made.pieces == expected.pieces if isinstance(expected, Text) else made == expected


@pytest.mark.parametrize(
    ("format", "record", "problem"),
    [
        ("alpaca", {"instruction": "Add."}, "field 'output' is missing (fields: instruction)"),
        ("alpaca", {"instruction": "Add.", "output": "3", "input": 12}, "'input' must be text, got int"),
        ("alpaca", {"instruction": "Add.", "output": "3", "system": ["a"]}, "'system' must be text, got list"),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3", "history": "Hi"},
            "'history' must be a list of pairs of texts, what was asked",
        ),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3", "history": [["Hi"]]},
            "'history' must be a list of pairs of texts",
        ),
        (
            "alpaca",
            {"instruction": "Add.", "output": "3", "history": [["Hi", None]]},
            "'history' must be a list of pairs of texts",
        ),
        ("lift_paper", {"instruction": "Add.", "output": None}, "'output' must be text, got null"),
        (
            "prompt_completion",
            {"prompt": turns("1+2"), "completion": "3"},
            "must both be texts, or both lists of messages",
        ),
        (
            "prompt_completion",
            {"prompt": "1+2", "completion": turns("", "3")[1:]},
            "must both be texts, or both lists of messages",
        ),
        ("prompt_completion", {"prompt": turns("1+2")}, "'prompt' must be text, got list"),
        (
            "prompt_completion",
            {"prompt": turns("1+2", "3"), "completion": turns("1+3")},
            "'prompt + completion' has no assistant turn",
        ),
        (
            "prompt_completion",
            {"prompt": turns("1+2", "3"), "completion": []},
            "'prompt + completion' has no assistant turn",
        ),
        (
            "prompt_completion",
            {"prompt": "1+2", "completion": "3", "system": "Add."},
            "'system' goes with 'prompt' and 'completion' that are lists",
        ),
        ("question_answer", {"question": "1+2", "answer": 3}, "'answer' must be text, got int"),
        ("question_answer", {"question": "1+2", "answer": "3", "context": ["a"]}, "'context' must be text, got list"),
        ("prompt_response", {"prompt": turns("1+2"), "response": "3"}, "'prompt' must be text, got list"),
        ("text", {"text": None}, "'text' must be text, got null"),
    ],
)
def test_what_does_not_fit_is_refused(format, record, problem):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FORMATS.load(format).read(record)
    assert problem in str(caught.value)


def test_the_wording_of_the_authors_makes_their_tokens(tokenizer):
    """Prompt and target in one text; the target, its blank and the end of sequence are learned."""
    ((ids, is_learned),) = Encoder(tokenizer)(FORMATS.load("lift_paper").read({"instruction": "Add.", "output": "3"}))
    assert ids == tokenizer(LIFT + "3 ")["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode([i for i, used in zip(ids, is_learned, strict=True) if used]) == "3 " + tokenizer.eos_token


def test_the_wording_of_the_authors_begins_as_theirs_with_a_tokenizer_that_begins_texts(tmp_path):
    """As Llama 2's does: it reads the text's own ``<s>`` as its beginning of sequence, and puts another before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "Below": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="?")
    ((ids, _),) = Encoder(fast)(FORMATS.load("lift_paper").read({"instruction": "Add.", "output": "3"}))
    assert ids == fast(LIFT + "3 </s>")["input_ids"]
    assert ids[:3] == [0, 0, 3]
    ((ids, _),) = Encoder(fast)(FORMATS.load("prompt_completion").read({"prompt": "<s> Below", "completion": " 3"}))
    assert ids[:2] == [0, 3]  # what a record writes itself is not repeated


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_what_it_uses(name):
    module = FORMATS.load(name)
    assert module.RESPONSE is None or module.RESPONSE in module.FIELDS
    assert not set(module.FIELDS) & set(module.OPTIONAL)
    page = (ROOT / "docs" / "data.md").read_text()
    assert f"`{name}`" in page
    assert all(f"`{field}`" in page or f'"{field}"' in page for field in (*module.FIELDS, *module.OPTIONAL))
