"""Prompts are those of training, expected answers those of the records, and tasks that cannot be right are refused."""

import json
from dataclasses import replace

import builders
import pytest

from liftdist.data import records
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation, Text
from liftdist.errors import UserError
from liftdist.evaluation import tasks
from liftdist.evaluation.questions import questions
from liftdist.evaluation_settings import TaskConfig
from liftdist.registry import FORMATS, SCORERS

SECTION = "eval.tasks.0"


def task(path, lines, **settings):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TaskConfig(**{"name": "t", "path": str(path), "scorer": "exact", **settings})


@pytest.fixture
def made(tmp_path):
    return lambda lines, **settings: questions(task(tmp_path / "t.jsonl", lines, **settings), SECTION)


@pytest.mark.parametrize("name", [name for name in builders.RECORDS if name != "text"])
def test_the_prompt_is_what_training_has_before_the_reply(name, made, tokenizer):
    """Token by token, for every format."""
    record = builders.RECORDS[name]
    encoder = Encoder(tokenizer)
    ((ids, learned),) = encoder(FORMATS.load(name).read(record))
    (question,) = made([record])
    text, prompt = encoder.prompt(question.prompt)
    assert prompt == ids[: learned.index(1.0)]
    assert text == tokenizer.decode(prompt)
    assert question.expected == ("3",)


def test_a_beginning_of_sequence_stands_before_a_prompt_as_in_training(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begun = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    begun.add_special_tokens({"bos_token": "<s>"})
    bos = begun.bos_token_id
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    encoder = Encoder(begun)
    plain, paper = Text([("<s> 1+2=", False)]), Text([("<s> 1+2=", False)], second_bos=True)
    assert encoder.prompt(Text([("1+2=", False)]))[1][0] == bos
    assert encoder.prompt(plain)[1].count(bos) == 1
    assert encoder.prompt(paper)[1].count(bos) == 2
    for content in (plain, paper):
        ids, _ = encoder(Text([*content.pieces, (" 3", True)], content.second_bos))[0]
        assert ids[: len(encoder.prompt(content)[1])] == encoder.prompt(content)[1]


def test_the_last_reply_is_asked_for(made, tokenizer):
    said = [("system", "Add."), ("user", "1+1"), ("assistant", "2"), ("user", "1+2"), ("assistant", "3")]
    messages = [{"role": role, "content": content} for role, content in said]
    (question,) = made([{"messages": messages}])
    assert question.prompt == Conversation(messages[:-1])
    assert question.expected == ("3",)
    assert Encoder(tokenizer).prompt(question.prompt)[0].endswith("1+2<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3", ("3",)),
        (3, ("3",)),
        (2304.0, ("2304.0",)),
        (True, ("true",)),
        (["3", 4.5], ("3", "4.5")),
    ],
)
def test_expected_answers_may_be_texts_numbers_and_lists(answer, expected, made):
    (question,) = made([{"instruction": "1+2", "output": "so 3", "answer": answer}], expected="answer")
    assert question.expected == expected


def test_wording_of_ones_own_and_a_limit(made):
    lines = [{"query": f"{n}+1", "right": str(n + 1)} for n in range(5)]
    found = made(lines, prompt_template="Q: {query}\nA:", expected="right", limit=3)
    assert [question.prompt for question in found] == [Text([(f"Q: {n}+1\nA:", False)]) for n in range(3)]
    assert [(question.id, question.expected, question.record) for question in found] == [
        (n, (str(n + 1),), lines[n]) for n in range(3)
    ]


def test_options_of_multiple_choice(made):
    lines = [
        {"question": "1+2", "answer": "3", "choices": ["2", "3"]},
        {"question": "2+2", "answer": 0, "choices": ["4", "5", "6"]},
    ]
    settings = dict(kind="multiple_choice", scorer=None, prompt_template="{question}", expected="answer")
    found = made(lines, **settings, options_field="choices")
    assert [(question.options, question.expected) for question in found] == [
        (("2", "3"), ("3",)),
        (("4", "5", "6"), ("4",)),
    ]
    assert made(lines[:1], **settings, options=["3", "4"])[0].options == ("3", "4")


def test_perplexity_needs_no_prompt(made):
    (question,) = made([{"text": "Once"}], kind="perplexity", scorer=None)
    assert (question.prompt, question.expected) == (Text([]), ("Once",))


def test_texts_of_the_base_model_are_those_that_are_asked_for(tmp_path):
    task, path, texts = (
        TaskConfig(kind="own_text", size=2, seed=3),
        tmp_path / "texts.json",
        [[[5, 6], -1.5], [[7], -0.5]],
    )
    for held in (texts, {"size": 2, "seed": 3, "max_new_tokens": task.max_new_tokens, "texts": texts}):
        path.write_text(json.dumps(held))
        assert tasks._drawn_before(path, task) == texts
    for other, problem in (
        (dict(seed=4), "holds texts that were drawn once, with seed=3; set that, or give the task another name"),
        (dict(size=1, max_new_tokens=9), f"with size=2 max_new_tokens={task.max_new_tokens}; set those, or give"),
    ):
        with pytest.raises(UserError, match=problem):
            tasks._drawn_before(path, replace(task, **other))


def test_generated_questions(tokenizer):
    task = TaskConfig(generator="chain_sum", size=3, seed=5, arguments={"min_terms": 2, "max_terms": 2}, limit=2)
    found = questions(task, SECTION)
    assert [question.record["metadata"]["num_terms"] for question in found] == [2, 2]
    assert found == questions(task, SECTION)
    assert found != questions(TaskConfig(generator="chain_sum", size=3, seed=6, limit=2), SECTION)
    for question in found:
        assert question.expected == (question.record["answer"],)
        assert question.prompt == Conversation([{"role": "user", "content": question.record["question"]}])


def test_generated_questions_of_which_no_answer_is_known_beforehand():
    task = TaskConfig(generator="graph_color", size=1)
    (question,) = questions(task, SECTION)
    assert question.expected == ("",)
    made = SCORERS.load("reasoning_gym").make(task)
    right = json.dumps(question.record["metadata"]["possible_answer"])
    assert made.score(right, question.expected, question.record).score == 1
    assert made.score("{}", question.expected, question.record).score < 0.5


def test_an_answer_on_which_its_generator_fails_is_wrong():
    task = TaskConfig(generator="prime_factorization", size=1)
    (question,) = questions(task, SECTION)
    made = SCORERS.load("reasoning_gym").make(task)
    assert made.score("no idea", question.expected, question.record)[:2] == (0.0, "no idea")
    assert made.score(question.expected[0], question.expected, question.record).score == 1


ASKED = {"role": "user", "content": "1+2"}
MEASURED = dict(kind="perplexity", scorer=None)
MULTIPLE = dict(kind="multiple_choice", scorer=None, expected="answer", options_field="choices")


@pytest.mark.parametrize(
    ("record", "settings", "problem"),
    [
        ({"output": "3", "answer": 3}, dict(expected="label"), r"t.jsonl:1: field 'label' \(eval.tasks.0.expected\) is missing"),
        ({"output": ""}, {}, "t.jsonl:1: the reply is empty, got ''"),
        ({"output": "3", "answer": []}, dict(expected="answer"), "holds no answer"),
        ({"output": "3", "answer": None}, dict(expected="answer"), "must be a text, a number, or a list of them, got NoneType"),
        ({"output": "3", "answer": {"x": 1}}, dict(expected="answer"), "must be a text, a number, or a list of them, got dict"),
        ({"output": "three"}, dict(scorer="last_number"), "the reply holds no number, got 'three'"),
        (
            {"output": "3", "answer": ["A", "F"]},
            dict(scorer="option", options=["A", "B"], expected="answer"),
            r"t.jsonl:1: field 'answer' \(eval.tasks.0.expected\) is none of the options A, B, got \['A', 'F'\]",
        ),
        ({"output": "3", "answer": "3", "choices": ["2", "4"]}, MULTIPLE, "is none of the options 2, 4, got '3'"),
        ({"output": "3", "answer": 2, "choices": ["2", "4"]}, MULTIPLE, "is 2, but the options have the numbers 0 to 1"),
        ({"output": "3", "answer": -1, "choices": ["2", "4"]}, MULTIPLE, "is -1, but the options have the numbers 0 to 1"),
        ({"output": "3", "answer": "3"}, MULTIPLE, "field 'choices' .* must be a list of two texts or more"),
        ({"output": "3", "answer": "b", "choices": ["b", ""]}, MULTIPLE,
         r"field 'choices' \(eval.tasks.0.options_field\): options must be different, and none empty, got \['b', ''\]"),
        ({"output": "3", "answer": "b", "choices": ["b", "b"]}, MULTIPLE, "options must be different, and none empty"),
        ({"output": "b"}, dict(kind="multiple_choice", scorer=None, options=["b", "b"]), "eval.tasks.0.options: options must be"),
        ({"output": ""}, MEASURED, "t.jsonl:1: the reply is empty, and has no perplexity; leave the record out"),
        ({"output": "3", "answer": ["1", "2"]}, dict(**MEASURED, expected="answer"), "holds 2 answers, and the perplexity is"),
        ({"messages": [ASKED, {"role": "assistant", "content": "3", "reasoning_content": "1 and 2"}]}, MEASURED,
         "the reply has reasoning_content beside its text, of which no perplexity is measured; leave it out"),
        ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]}, MEASURED,
         "the reply has tool_calls beside its text"),
        ({"text": "Once"}, dict(format="text"), "has no prompt: all of the record is the reply"),
        ({"output": "3"}, dict(prompt_template="{query}", expected="output"), "field 'query' of eval.tasks.0.prompt_template"),
        ({"output": "3"}, dict(fields={"instruction": "ask"}), r"field 'ask' \(eval.tasks.0.fields.instruction\) is missing"),
        ({"output": "3"}, dict(split="validation"), "eval.tasks.0.split=validation: data .*t.jsonl has no splits"),
    ],
)  # fmt: skip
def test_tasks_whose_records_do_not_fit_are_refused(record, settings, problem, made):
    with pytest.raises(UserError, match=problem) as error:
        made([record if "messages" in record else {"instruction": "1+2"} | record], **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(generator="chain_sums"), "has no generator chain_sums; did you mean chain_sum?"),
        (dict(generator="chain_sum", arguments={"terms": 2}), "does not take its arguments: .*'terms'"),
        (dict(generator="chain_sum", arguments={"min_terms": 9, "max_terms": 2}), "does not take its arguments: "),
    ],
)
def test_generators_that_do_not_fit_are_refused(settings, problem):
    with pytest.raises(UserError, match=problem) as error:
        questions(TaskConfig(**settings), SECTION)
    assert "\n" not in str(error.value)


def test_an_empty_source_is_refused(made):
    with pytest.raises(UserError, match="holds no record"):
        made([])


def test_tokens_of_a_prompt_need_a_chat_template(tokenizer):
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    content = Conversation([{"role": "user", "content": "1+2"}])
    with pytest.raises(UserError, match="t:1: the tokenizer has no chat template"):
        records.at("t:1", lambda _: Encoder(plain).prompt(content), {})
