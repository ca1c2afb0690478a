"""Every chat template that trl ships: each reply is learned from its first character to the token that ends it, or refused.

trl's own training templates, which mark what is to be learned, are an independent reference where they render the same text.
"""

import copy
import importlib.util
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from liftdist.data import chat
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = (
    r"<\|[^|<>\s]*\|>|<｜[^｜\s]*｜>|</?s>|<(?:start|end)_of_turn>|<[a-z]+\||\|[a-z]+>|<eos>|<bos>|<\|?[a-z_]+\|?>"
)
#: Tokens by which the models of these templates stop, as their generation_config.json says.
STOPS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|user|>",
    "<|observation|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
]
STOPS += ["<|END_OF_TURN_TOKEN|>", "<turn|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|eom_id|>"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"city": "Oslo"}}}
CONVERSATIONS = {
    "single": [user("What is it?"), assistant("Four it is.")],
    "three": [user("q one"), assistant("a one"), user("q two"), assistant("a two"), user("q three"), assistant("a three")],
    "system": [{"role": "system", "content": "Be terse."}, user("q one"), assistant("a one"), user("q two"), assistant("a two")],
    "reasoning": [user("q one"), assistant("a one", reasoning_content="r one"),
                  user("q two"), assistant("a two", reasoning_content="r two")],
    "tags": [user("q one"), assistant("<think>\nr one\n</think>\n\na one"),
             user("q two"), assistant("<think>\nr two\n</think>\n\na two")],
    "tool": [user("q one"), assistant("", tool_calls=[CALL]),
             {"role": "tool", "name": "lookup", "content": "sunny"}, assistant("It shines.")],
    "user at the end": [user("q one"), assistant("a one"), user("q two")],
}  # fmt: skip
TEXTS = {  # what must be learned of each reply
    "single": [["Four it is."]],
    "three": [["a one"], ["a two"], ["a three"]],
    "system": [["a one"], ["a two"]],
    "reasoning": [["r one", "a one"], ["r two", "a two"]],
    "tags": [["r one", "a one"], ["r two", "a two"]],
    "tool": [["lookup", "city", "Oslo"], ["It shines."]],
    "user at the end": [["a one"]],
}
NEVER = ["What is it?", "q one", "q two", "q three", "Be terse.", "sunny"]


@pytest.fixture(scope="module")
def encoder_of(tokenizer):
    def make(name):
        text = (FOLDER / f"{name}.jinja").read_text()
        own = copy.deepcopy(tokenizer)
        special = sorted({*re.findall(SPECIAL, text), *STOPS} - {"<think>", "</think>"})
        own.add_tokens(special, special_tokens=True)
        return Encoder(own, text, stops=STOPS)

    return make


def learned(encoder, sample):
    """The learned pieces of a sample as texts, and its whole text."""
    ids, flags = sample
    pieces, before = [], False
    for token, flag in zip(ids, flags, strict=True):
        if flag and not before:
            pieces.append([])
        if flag:
            pieces[-1].append(token)
        before = flag
    return [encoder.tokenizer.decode(piece) for piece in pieces], encoder.tokenizer.decode(ids)


#: What a template is refused for: the conversation is not learned in silence without a part of it.
REFUSED = (
    r"drops (reasoning_content|tool_calls|content)|refuses this conversation|fails on this|drops message \d|depending on"
    "|once more"
)


#: Templates whose prompt for a reply opens reasoning, or closes it, whatever the reply holds; the conversations that show it.
PLAIN = {"single", "three", "system", "tool", "user at the end"}
ASKS_OTHERWISE = {
    **dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], PLAIN),
    **dict.fromkeys(["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"], PLAIN),
    "qwen3_5_nothink": {"reasoning", "tags"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_reply_is_learned_or_refused(name, encoder_of):
    encoder, seen = encoder_of(name), 0
    for kind, messages in CONVERSATIONS.items():
        try:
            samples = encoder(Conversation(messages))
        except ValueError as error:
            reason = str(error)
            assert kind not in ("single", "three"), reason
            assert re.search(REFUSED, reason), kind
            continue
        assert encoder.asked_otherwise is (kind in ASKS_OTHERWISE.get(name, ())), kind
        pieces = [piece for sample in samples for piece in learned(encoder, sample)[0]]
        assert len(pieces) == len(TEXTS[kind]), (kind, pieces)
        for piece, texts in zip(pieces, TEXTS[kind], strict=True):
            assert all(text in piece for text in texts), (kind, pieces)
            assert not any(text in piece for text in NEVER), (kind, pieces)
            assert encoder._special.search(piece.rstrip(), len(piece.rstrip()) - 30), (
                kind,
                piece,
            )  # a token to stop by
        seen += 1
    assert seen >= 4


#: What trl marks and liftdist does not learn, or the other way: a part of the prompt that the template writes for a reply, which
#: the model is given and does not write.
OF_THE_PROMPT = ["\n", "<|start|>assistant", "<｜Assistant｜>", "<think>\n", "<think>\n\n</think>\n\n"]


@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / f"{name}_training.jinja").exists()])
def test_it_is_what_trl_marks(name, encoder_of):
    ours, theirs = encoder_of(name), encoder_of(f"{name}_training")
    compared = 0
    for messages in CONVERSATIONS.values():
        try:
            (sample,), reference = ours(Conversation(messages)), theirs._render(Conversation(messages), messages, False)
        except ValueError:
            continue
        text, blocks = reference
        if learned(ours, sample)[1] != text:  # their template renders another text, to keep prefixes
            continue
        expected = [text[begin:end] for begin, end in blocks]
        pieces = learned(ours, sample)[0]
        for piece, reply in zip(pieces, join_adjacent(blocks, text), strict=True):
            # Gemma stops by a token to be answered by a tool; after the answer its template writes no prompt for the reply
            shared = piece.removesuffix("<|tool_response>").removeprefix("<|turn>model\n")
            shared = shared.rstrip(" ")
            assert reply.rstrip(" ").endswith(shared), (piece, reply, expected)
            assert reply[: reply.rindex(shared)] in ("", *OF_THE_PROMPT), (piece, reply)
        compared += 1
    assert compared or name in ("glm4moe",)


def join_adjacent(blocks, text):
    """The marked texts, adjacent blocks as one."""
    joined = []
    for begin, end in blocks:
        if begin == end:
            continue
        if joined and joined[-1][1] == begin:
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    return [text[begin:end] for begin, end in joined]


def test_turns_decides_between_one_sample_and_one_a_reply(encoder_of):
    thinking = encoder_of("qwen3")
    counts = {}
    for turns in (chat.AUTO, chat.WHOLE, chat.SPLIT):
        thinking._turns = turns
        for kind in ("three", "tags"):
            try:
                counts[turns, kind] = len(thinking(Conversation(CONVERSATIONS[kind])))
            except ValueError as error:
                counts[turns, kind] = str(error)
    assert counts[chat.AUTO, "three"] == counts[chat.WHOLE, "three"] == 1
    assert counts[chat.SPLIT, "three"] == 3
    assert counts[chat.AUTO, "tags"] == counts[chat.SPLIT, "tags"] == 2
    assert "data.turns=split makes a sample of each reply" in counts[chat.WHOLE, "tags"]


def test_the_date_that_a_template_writes_is_that_of_the_run(encoder_of, tokenizer):
    text = (FOLDER / "llama3_2.jinja").read_text()
    assert "strftime_now" in text
    encoders = [Encoder(tokenizer, text, stops=STOPS, date=datetime(2024, 5, day, tzinfo=UTC)) for day in (1, 1, 2)]
    texts = [learned(e, e(Conversation(CONVERSATIONS["single"]))[0])[1] for e in encoders]
    assert "01 May 2024" in texts[0]
    assert "02 May 2024" in texts[2]
    assert encoders[0].digest == encoders[1].digest != encoders[2].digest
    plain = [Encoder(tokenizer, date=datetime(2024, 5, day, tzinfo=UTC)).digest for day in (1, 2)]
    assert plain[0] == plain[1]  # of a template without a date


def test_only_the_replies_that_are_meant_are_learned(tokenizer):
    conversation = Conversation(CONVERSATIONS["three"], masked=frozenset({1}))
    (sample,) = Encoder(tokenizer)(conversation)
    assert [piece.rstrip() for piece in learned(Encoder(tokenizer), sample)[0]] == [
        "a two<|im_end|>",
        "a three<|im_end|>",
    ]
    (sample,) = Encoder(tokenizer, learn=chat.LAST)(conversation)
    assert [piece.rstrip() for piece in learned(Encoder(tokenizer), sample)[0]] == ["a three<|im_end|>"]
    everything = Conversation(CONVERSATIONS["single"], masked=frozenset({1}))
    assert not any(flag for _, flags in Encoder(tokenizer)(everything) for flag in flags)


DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
)
DROPS_SYSTEM += "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (DROPS_SYSTEM, CONVERSATIONS["system"],
         "drops message 1, of role 'system'; leave it out, or use another data.chat_template"),
        (DROPS_SYSTEM, [{"role": "developer", "content": "x y"}, *CONVERSATIONS["single"]], "message 1, of role 'developer'"),
        (DROPS_SYSTEM, CONVERSATIONS["reasoning"], "drops reasoning_content of message 2, or a part of it"),
        (DROPS_SYSTEM, CONVERSATIONS["tool"], "drops tool_calls of message 2, or a part of it"),
        (DROPS_SYSTEM, [*CONVERSATIONS["single"], {"role": "tool", "content": "so it is"}, assistant("Fine.")],
         "drops message 3, of role 'tool'"),
        ("{{ x }}\n{% for %}", CONVERSATIONS["single"], "the chat template is malformed: line 2: Expected an expression"),
        ("{{ '\ud800' }}" + DROPS_SYSTEM, CONVERSATIONS["single"], "the chat template writes half of a surrogate pair"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", CONVERSATIONS["single"], "fails on this conversation: Recursion"),
        ("{{ nothing.at.all }}", CONVERSATIONS["single"], "refuses this conversation: 'nothing' is undefined"),
        ("{% include 'x' %}", CONVERSATIONS["single"], "fails on this conversation: TypeError: no loader"),
        ("{{ messages[9].content }}", CONVERSATIONS["single"], "refuses this conversation: list object has no element 9"),
        ("{{ messages | none }}", CONVERSATIONS["single"], "the chat template is malformed: line 1: No filter named 'none'"),
        ("{{ messages() }}", CONVERSATIONS["single"], "fails on this conversation: TypeError: 'list' object is not callable"),
        ("{% for i in range(10**9) %}{% endfor %}", CONVERSATIONS["single"], "fails on this conversation: OverflowError: Range"),
        ("{{ messages[0]['content'] + 1 }}", CONVERSATIONS["single"], "the chat template fails on this conversation: TypeError"),
        ("{{ raise_exception('No!\n No.') }}", CONVERSATIONS["single"],
         "the chat template refuses this conversation: No! No.; change the record, or use another data.chat_template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", CONVERSATIONS["single"], "writes no token after a reply by which"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_say_is_refused(template, messages, problem, tokenizer):
    with pytest.raises(ValueError, match=re.escape(problem)):
        Encoder(tokenizer, template)(Conversation(messages))
    for turns in (chat.WHOLE, chat.SPLIT):  # no remedy that does not help
        with pytest.raises(ValueError, match="the chat template ") as caught:
            Encoder(tokenizer, template, turns=turns)(Conversation(messages))
        assert "data.turns" not in str(caught.value)


def of_calls(written):
    """A template that writes of a reply with calls what ``written`` says of each ``call``, and nothing else."""
    call = f"{{% for c in m.tool_calls %}}{{% set call = c.function %}}{written}{{% endfor %}}"
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}" + call
    head += "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    return head + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


JSON_CALLS = "{{ call | tojson }}"


def calling(*arguments, content=""):
    """A conversation in which the second message calls a tool with each of the arguments."""
    calls = [{"type": "function", "function": {"name": "area", "arguments": given}} for given in arguments]
    return [
        {"role": "user", "content": "How large?"},
        assistant(content, tool_calls=calls),
        {"role": "tool", "content": "12"},
        assistant("Twelve."),
    ]


@pytest.mark.parametrize(
    ("written", "messages", "key"),
    [
        (JSON_CALLS, calling({"a": 3, "is_round": False, "deep": [{"b": None, "c": 0.5}]}), None),
        (JSON_CALLS, calling({"a": True, "b": "True", "c": 3, "d": "3", "e": "a", "f": "\"3\"\n"}, content=""), None),
        ("{{ call.name }}{% for name, one in call.arguments.items() %} {{ name }}={{ one }}{% endfor %}",
         calling({"a": 3, "is_round": False}), None),
        ("{{ call.name }}", calling({"a": 3}), "tool_calls"),
        ("{{ call.name }} a {{ call.arguments.a }}", calling({"a": 3, "is_round": False}), "tool_calls"),
        ("{{ call.name }}{% for one in call.arguments.values() %} {{ one }}{% endfor %}", calling({"wide": "yes"}), "tool_calls"),
        ("{% if loop.first %}" + JSON_CALLS + "{% endif %}", calling({"a": 3}, {"a": 3}), "tool_calls"),
        (JSON_CALLS, calling({"a": "Rome"}, content="Rome"), "content"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["learned", "masked", "last", "prompt"])
def test_all_of_a_call_and_of_what_is_said_beside_it_is_written(written, messages, key, where, tokenizer):
    encoder = Encoder(tokenizer, of_calls(written), learn=chat.LAST if where == "last" else chat.ALL)
    conversation = Conversation(messages, masked=frozenset({1} if where == "masked" else ()))
    encode = encoder.prompt if where == "prompt" else encoder
    if key is None:
        assert encode(Conversation(messages[:3]) if where == "prompt" else conversation)
        return
    with pytest.raises(ValueError, match=f"^the chat template drops {key} of message 2, or a part of it; use another"):
        encode(Conversation(messages[:3]) if where == "prompt" else conversation)


def test_a_prompt_says_all_that_stands_before_the_reply(tokenizer, encoder_of):
    system, *others = CONVERSATIONS["system"]
    with pytest.raises(ValueError, match="drops message 1, of role 'system'; leave it out"):
        Encoder(tokenizer, DROPS_SYSTEM).prompt(Conversation([system, *others[:-1]]))
    forgetful = encoder_of("deepseek_r1_distill")  # of the past it writes no reasoning
    text, _ = forgetful.prompt(Conversation(CONVERSATIONS["tags"][:3]))
    assert "a one" in text
    assert "r one" not in text


def test_an_argument_of_the_template_makes_it_ask_as_it_writes(encoder_of):
    encoder = encoder_of("nemotron_3_nano")
    for arguments, expected in (({}, True), ({"enable_thinking": False}, False)):
        encoder(Conversation(CONVERSATIONS["single"], arguments=arguments))
        assert encoder.asked_otherwise is expected


@pytest.mark.parametrize("turns", [chat.AUTO, chat.WHOLE, chat.SPLIT])
def test_a_template_that_drops_the_newest_reasoning_too_needs_another(turns, encoder_of):
    """As it ships with the distillations of DeepSeek R1."""
    encoder = encoder_of("deepseek_r1_distill")
    encoder._turns = turns
    for kind, key in (("tags", "content"), ("reasoning", "reasoning_content")):
        with pytest.raises(ValueError, match="drops") as caught:
            encoder(Conversation(CONVERSATIONS[kind][:2]))
        assert str(caught.value) == (
            f"the chat template drops {key} of message 2, or a part of it; use another data.chat_template, which keeps it"
        )
