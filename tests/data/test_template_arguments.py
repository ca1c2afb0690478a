"""Arguments of the chat template reach it as they were given; what it would not read is refused by name."""

import copy
import json

import builders
import pytest
from commands import call, write_config

from liftdist.data import templates, tokenised
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation
from liftdist.errors import UserError

MESSAGES = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHOWS = "{% if x is defined %}{{ x | tojson }}{% else %}nothing{% endif %}" + TURNS
THINKS = "{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}"
THINKS += "{% if message_style %}{{ bos_token }}{% endif %}" + TURNS


def text_of(tokenizer, template, arguments, of_record=None):
    ((ids, _),) = Encoder(tokenizer, template, arguments)(Conversation(MESSAGES, arguments=of_record or {}))
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (False, "false"), (True, "true"), (0, "0"), (0.5, "0.5"), ("false", '"false"'), ("", '""'), ([1, "a"], '[1, "a"]'),
        ({"b": 1, "a": [True]}, '{"b": 1, "a": [true]}'), ([{"title": "t", "text": "x"}], '[{"title": "t", "text": "x"}]'),
        (None, "nothing"),
    ],
)  # fmt: skip
def test_a_value_keeps_its_type(value, shown, tokenizer):
    assert text_of(tokenizer, SHOWS, {"x": value}).startswith(f"{shown}<|im_start|>user")


def test_those_of_a_record_win(tokenizer):
    assert text_of(tokenizer, SHOWS, {"x": 1}, {"x": 2}).startswith("2<")
    assert text_of(tokenizer, THINKS, {"enable_thinking": False}).startswith("False<")
    assert text_of(tokenizer, THINKS, {}).startswith("True<")


def test_documents_are_an_argument_like_any_other(tokenizer):
    template = "{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}" + TURNS
    assert text_of(tokenizer, template, {"documents": [{"title": "a", "text": "b"}]}).startswith("[a: b]<")


@pytest.mark.parametrize(
    ("template", "arguments", "problem"),
    [
        (THINKS, {"enable_thinkng": False}, "enable_thinkng: the chat template does not read it; did you mean enable_thinking?"),
        (THINKS, {"x": 1}, "x: the chat template does not read it; it takes enable_thinking, message_style"),
        (TURNS, {"enable_thinking": False}, "enable_thinking: the chat template does not read it; it takes no arguments"),
        (TURNS + "{# thinking #}{{ messages[0].thinking }} thinking", {"thinking": True}, "thinking: the chat template does not"),
        (TURNS, {"content": "x"}, "content: the chat template does not read it"),
        (TURNS, {"m": "x"}, "m: the chat template does not read it"),
        ("", {"x": 1}, "x: the tokenizer has no chat template that could read it; give data.chat_template"),
        *((THINKS + "{{ " + name + " }}", {name: "x"}, f"{name}: is given to every chat template")
          for name in ("messages", "tools", "add_generation_prompt", "chat_template", "bos_token", "eos_token",
                       "continue_final_message", "return_assistant_tokens_mask", "conversations", "raise_exception")),
    ],
)  # fmt: skip
def test_what_the_template_does_not_read_is_refused(template, arguments, problem, tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template = None
    with pytest.raises(UserError) as caught:
        Encoder(own, template, arguments)
    assert str(caught.value).startswith(f"data.template_arguments.{problem}")
    assert "\n" not in str(caught.value)


def test_a_malformed_template_is_named_by_its_line(tokenizer):
    with pytest.raises(UserError, match="the chat template is malformed: line 2: "):
        Encoder(tokenizer, "{{ x }}\n{% if %}", {"x": 1})


def test_what_marks_replies_and_leaves_loops_is_read():
    text = (
        "{% for m in messages %}{% generation %}{{ a }}{% endgeneration %}{% if b %}{% break %}{% endif %}{% endfor %}"
    )
    assert templates.variables(text)[0] == {"messages", "a", "b"}


def test_they_decide_the_tokens(tokenizer, tmp_path):
    """Other arguments are other data, also where Python takes them for equal, and where only the order differs."""
    digests = [
        Encoder(tokenizer, SHOWS, {"x": value}).digest
        for value in (True, 1, 1.0, "1", [1], {"a": 1, "b": 2}, {"b": 2, "a": 1}, None, False)
    ]
    assert len(set(digests)) == len(digests)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    first_tokens = []
    for value in (True, 1, 1.0, {"a": 1, "b": 2}, {"b": 2, "a": 1}):
        config = builders.config(tmp_path, path, tmp_path, data=dict(template_arguments={"x": value})).data
        samples = tokenised.tokenise(
            config.training_sources[0], config, Encoder(tokenizer, SHOWS, {"x": value}), 49152, tmp_path / "cache"
        )
        first_tokens.append(tokenizer.decode(samples.table[0]["input_ids"]).partition("<")[0])
    assert first_tokens == ["true", "1", "1.0", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}']


def test_records_that_need_no_template_say_that_they_are_not_used(tokenizer, tmp_path):
    path = builders.write_records(tmp_path / "r.jsonl")
    config = builders.config(tmp_path, path, tmp_path, data=dict(template_arguments={"x": 1}, chat_template=SHOWS)).data
    encoder = Encoder(tokenizer, SHOWS, {"x": 1})
    samples = tokenised.tokenise(config.training_sources[0], config, encoder, 49152, tmp_path / "cache")
    assert samples.report.lines() == [
        "settings that are not used, because these records need no chat template: data.chat_template, data.template_arguments"
    ]


def test_a_records_own_argument_that_is_no_variable_is_named(tokenizer, tmp_path):
    """Also where the template's text mentions the word."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES, "chat_template_kwargs": {"role": 1, "x": 2}}) + "\n")
    config = builders.config(tmp_path, path, tmp_path).data
    encoder = Encoder(tokenizer, SHOWS)
    samples = tokenised.tokenise(config.training_sources[0], config, encoder, 49152, tmp_path / "cache")
    assert samples.report.lines() == ["keys that the chat template does not read: role"]


def test_from_the_command_line_to_the_tokens(tiny_model, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    config = write_config(tmp_path, tiny_model, path, data=dict(eval_path=None, chat_template=THINKS))
    tokens = []
    for value in ("false", "'false'", "'a text of six words'", "null"):
        code, said = call("select", config, "--prefetch", f"data.template_arguments.enable_thinking={value}")
        assert code == 0, said
        tokens.append(int(said.partition("samples, ")[2].partition(" tokens")[0]))
    assert [count - tokens[0] for count in tokens] == [0, 0, 4, 0]
    for word, problem in (
        ("enable_thinkng=false", "enable_thinkng: the chat template does not read it; did you mean enable_thinking?"),
        ("tools=[]", "tools: is given to every chat template by the records or the tokenizer; leave it out"),
    ):
        code, said = call("select", config, "--prefetch", f"data.template_arguments.{word}")
        assert (code, said) == (2, f"liftdist: data.template_arguments.{problem}\n")
