"""Conversations, from the many forms that people have them in, are what they say; what cannot be used is refused."""

import json

import pytest

from liftdist.data import content
from liftdist.data.content import Conversation, Text
from liftdist.registry import FORMATS

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def call(arguments, **others):
    return {"type": "function", **others, "function": {"name": "add", "arguments": arguments}}


def assistant(**keys):
    return {"role": "assistant", "content": "", **keys}


def read(turns, key="messages", **fields):
    return FORMATS.load({"messages": "messages", "conversations": "sharegpt"}[key]).read({key: turns, **fields})


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, REPLY], [USER, REPLY]),
        ([HUMAN, GPT], [USER, REPLY]),
        ([{"role": "human", "value": "Hi"}, {"from": "model", "content": "Yes"}], [USER, REPLY]),
        ([{**USER, "from": None, "value": None}, {**GPT, "role": None, "content": None}], [USER, REPLY]),
        ([{"role": "developer", "content": "Be brief."}, USER, REPLY],) * 2,
        ([{"from": "system", "value": ""}, HUMAN, GPT], [{"role": "system", "content": ""}, USER, REPLY]),
        ([USER, {**REPLY, "content": [{"type": "text", "text": "Y"}, {"type": "text", "text": "es"}]}], [USER, REPLY]),
        ([USER, {**REPLY, "content": ["Y", {"text": "es", "type": None, "image_url": None}]}], [USER, REPLY]),
        ([USER, {**REPLY, "content": [{"type": "output_text", "text": "Yes"}]}], [USER, REPLY]),
        ([USER, {**REPLY, "content": []}], [USER, assistant()]),
        ([USER, {**REPLY, "name": "Al", "reasoning_content": "Hm.", "mood": 3}],) * 2,
        (
            [USER, {**REPLY, "thinking": "Hm."}, USER, {**REPLY, "reasoning": "Hm.", "name": None}],
            [USER, {**REPLY, "thinking": "Hm."}, USER, {**REPLY, "reasoning": "Hm."}],
        ),
        # calls
        (
            [USER, assistant(content=None, tool_calls=[call({"a": 1}, id="c1")])],
            [USER, assistant(tool_calls=[call({"a": 1}, id="c1")])],
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [call('{"a": [1, null], "b": null}')]}],
            [USER, assistant(tool_calls=[call({"a": [1, None], "b": None})])],
        ),
        (
            [USER, assistant(tool_calls=[{"name": "add", "arguments": {"a": 1}}])],
            [USER, assistant(tool_calls=[call({"a": 1})])],
        ),
        (
            [USER, assistant(tool_calls=[{"name": "add", "parameters": {"a": 1}}])],
            [USER, assistant(tool_calls=[call({"a": 1})])],
        ),
        ([USER, assistant(tool_calls=json.dumps([call({"a": 1})]))], [USER, assistant(tool_calls=[call({"a": 1})])]),
        ([USER, assistant(tool_calls=[json.dumps(call({"a": 1}))])], [USER, assistant(tool_calls=[call({"a": 1})])]),
        (
            [USER, assistant(content=None, function_call={"name": "add", "arguments": '{"a": 1}'})],
            [USER, assistant(tool_calls=[call({"a": 1})])],
        ),
        *(
            ([USER, assistant(tool_calls=[call(given)])], [USER, assistant(tool_calls=[call({})])])
            for given in ("", " ", "null", None)
        ),
        ([USER, {**REPLY, "tool_calls": [], "function_call": None}], [USER, REPLY]),
        (
            [
                USER,
                assistant(tool_calls=[call({"a": 1}), call({"b": 2})]),
                {"role": "tool", "content": "3", "tool_call_id": "c", "name": "add"},
                REPLY,
            ],
        )
        * 2,
        # the speakers of ShareGPT
        (
            [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                GPT,
            ],
            [USER, assistant(tool_calls=[call({"a": 1})]), {"role": "tool", "content": "3"}, REPLY],
        ),
        (
            [
                HUMAN,
                {"from": "tool_call", "value": '[{"name": "add", "arguments": "{}"}, {"name": "add"}]'},
                {"from": "tool", "value": "3"},
                GPT,
            ],
            [USER, assistant(tool_calls=[call({}), call({})]), {"role": "tool", "content": "3"}, REPLY],
        ),
        (
            [HUMAN, {"from": "function_call", "value": {"name": "add", "arguments": {"a": 1}}}],
            [USER, assistant(tool_calls=[call({"a": 1})])],
        ),
        ([USER, assistant(tool_calls=[call({})]), {"role": "ipython", "content": "3"}, REPLY],) * 2,
        ([USER, assistant(tool_calls=[call({})]), {"role": "function", "name": "add", "content": "3"}, REPLY],) * 2,
        # any order of roles: the template decides
        ([REPLY, USER, REPLY, REPLY, USER],) * 2,
    ],
)
def test_turns_are_read_in_either_field(key, turns, expected):
    assert read(turns, key) == Conversation(expected)


def test_text_keeps_its_characters():
    said = "  a\n\n<|im_end|>\u2028{{ x }}\t\\n\u00e9 "
    assert read([USER, {**REPLY, "content": said}]).messages[1]["content"] == said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"system": "Be brief."}, Conversation([{"role": "system", "content": "Be brief."}, USER, REPLY])),
        (
            {"system": [{"type": "text", "text": "Be brief."}]},
            Conversation([{"role": "system", "content": "Be brief."}, USER, REPLY]),
        ),
        ({"system": "", "tools": "", "chat_template_kwargs": None}, Conversation([USER, REPLY])),
        ({"system": None, "tools": [], "functions": None}, Conversation([USER, REPLY])),
        ({"tools": [TOOL]}, Conversation([USER, REPLY], [TOOL])),
        ({"tools": json.dumps([TOOL])}, Conversation([USER, REPLY], [TOOL])),
        ({"tools": [json.dumps(TOOL)]}, Conversation([USER, REPLY], [TOOL])),
        ({"tools": [TOOL["function"]]}, Conversation([USER, REPLY], [TOOL])),
        ({"tools": [{"type": "function", **TOOL["function"]}]}, Conversation([USER, REPLY], [TOOL])),
        ({"functions": [TOOL["function"]]}, Conversation([USER, REPLY], [TOOL])),
        ({"tools": [{"builtin": "browser"}]}, Conversation([USER, REPLY], [{"builtin": "browser"}])),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            Conversation([USER, REPLY], None, {"enable_thinking": False}),
        ),
        ({"chat_template_kwargs": '{"effort": "low"}'}, Conversation([USER, REPLY], None, {"effort": "low"})),
    ],
)
def test_what_stands_beside_the_turns(fields, expected):
    assert read([USER, REPLY], **fields) == expected


@pytest.mark.parametrize(
    ("weights", "masked"),
    [
        ([{"weight": 0}, {"weight": 1}], {1}),
        ([{"weight": 0.0}, {"weight": 1.0}], {1}),
        ([{"train": False}, {"train": True}], {1}),
        ([{"loss": True}, {"loss_mask": 0}], {3}),
        ([{"training": False}, {"trainable": False}], {1, 3}),
        ([{"weight": 0, "train": False}, {"weight": None}], {1}),
        ([{}, {}], set()),
    ],
)
def test_replies_that_are_not_to_be_learned(weights, masked):
    first, second = ({**REPLY, **weight} for weight in weights)
    assert read([USER, first, USER, second]) == Conversation([USER, REPLY, USER, REPLY], masked=frozenset(masked))
    shifted = read([USER, first, {**USER, "weight": 0, "train": False}, second], system="S")  # which is message 0
    assert shifted.masked == {number + 1 for number in masked}
    assert all(not set(message) - {"role", "content"} for message in shifted.messages)


def test_a_reply_in_the_prompt_that_asks_to_be_learned_is_refused():
    def read(mark):
        earlier = {**REPLY, **mark}
        return FORMATS.load("prompt_completion").read({"prompt": [USER, earlier, USER], "completion": [REPLY]})

    assert read({"weight": 0}) == read({}) == Conversation([USER, REPLY, USER, REPLY], masked=frozenset({1}))
    with pytest.raises(
        ValueError, match="turn 2 of 'prompt . completion' asks to be learned, but stands in the prompt"
    ):
        read({"weight": 1})


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": []}, "'messages' must be a list of turns, got an empty list"),
        ({"messages": None}, "'messages' must be a list of turns, got null"),
        ({"messages": "Hi"}, "'messages' must be a list of turns, got str"),
        ({"messages": {"role": ["user"], "content": ["Hi"]}}, "'messages' must be a list of turns, got dict"),
        ({"messages": ["Hi", "Yes"]}, "turn 1 of 'messages' must be an object with 'role' and 'content', got str"),
        ({"messages": [USER]}, "'messages' has no assistant turn, so there is nothing to train on"),
        ({"messages": [USER, {"content": "Yes"}]}, "turn 2 of 'messages' needs 'role' or 'from' (keys: content)"),
        (
            {"messages": [USER, {**REPLY, "role": "Assistant"}]},
            "turn 2 of 'messages': role must be one of system, developer, ",
        ),
        (
            {"messages": [USER, {**REPLY, "from": "gpt"}]},
            "turn 2 of 'messages' has both 'role' and 'from'; leave one of them out",
        ),
        (
            {"messages": [{**USER, "role": ["user"]}, REPLY]},
            "turn 1 of 'messages' needs a role that is text, got list (keys: role,",
        ),
        ({"messages": [{**USER, "role": 1}, REPLY]}, "turn 1 of 'messages' needs a role that is text, got int"),
        (
            {"messages": [USER, {**REPLY, "weight": 10**99}]},
            "'weight' must be 0 or 1, or true or false, got 1000000000000000000000000",
        ),
        (
            {"messages": [USER, {**REPLY, "value": "No"}]},
            "turn 2 of 'messages' has both 'content' and 'value'; leave one of them out",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 of 'messages' needs 'content' or 'value', or tool calls"),
        ({"messages": [USER, {**REPLY, "content": 3}]}, "turn 2 of 'messages' must hold text, got int"),
        (
            {"messages": [USER, REPLY, {"role": "tool", "content": {"a": 1}}]},
            "turn 3 of 'messages' must hold text, got dict",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, REPLY], "system": "b"},
            "a system prompt stands beside 'messages' and in it",
        ),
        ({"messages": [USER, REPLY], "system": 3}, "'system' must hold text, got int"),
        # what is no text
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, REPLY]},
            "turn 1 of 'messages' has a part of type 'image_url', and only text can be learned; remove the record or the part",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, REPLY]},
            "a part of type 'image'",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "input_audio", "input_audio": {}}]}, REPLY]},
            "a part of type 'input_audio'",
        ),
        ({"messages": [{**USER, "content": [{"type": "video", "video": "x"}]}, REPLY]}, "a part of type 'video'"),
        (
            {"messages": [USER, {**REPLY, "content": [{"type": "thinking", "thinking": "Hm."}]}]},
            "give it as 'reasoning_content' of the message",
        ),
        (
            {"messages": [USER, {**REPLY, "content": [{"type": "text", "text": "Yes", "weight": 0}]}]},
            "a part of text with weight, which nothing reads",
        ),
        (
            {"messages": [USER, {**REPLY, "content": [{"type": "text"}]}]},
            "turn 2 of 'messages' has a part of type 'text', and only",
        ),
        ({"messages": [USER, {**REPLY, "content": [7]}]}, "a part of its content must be text or an object, got int"),
        (
            {"messages": [{**USER, "images": ["x.png"]}, REPLY]},
            "turn 1 of 'messages' has 'images', and only text can be learned",
        ),
        # weights
        (
            {"messages": [USER, {**REPLY, "weight": 0.5}]},
            "turn 2 of 'messages': 'weight' must be 0 or 1, or true or false, got 0.5",
        ),
        (
            {"messages": [USER, {**REPLY, "weight": 1, "train": False}]},
            "turn 2 of 'messages': 'weight' and 'train' say of a reply that it is learned, and that it is not",
        ),
        ({"messages": [USER, {**REPLY, "train": "false"}]}, "'train' must be 0 or 1, or true or false, got 'false'"),
        (
            {"messages": [{**USER, "weight": 1}, REPLY]},
            "turn 1 of 'messages': 'weight' asks to learn a turn of role 'user', but only",
        ),
        (
            {"messages": [USER, {**REPLY, "masked": True}]},
            "'masked' is not used; say by 'weight', 0 or 1, whether a reply is learned",
        ),
        # calls
        (
            {"messages": [USER, assistant(tool_calls=[call("{'a': 1}")])]},
            """turn 2 of 'messages': arguments of the call of add: not JSON: "{'a': 1}\"""",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[call("[1]")])]},
            "arguments of the call of add must be an object, got list",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[call({}) | {"type": "custom"}])]},
            "must be of type 'function', got 'custom'",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[{"id": "c1"}])]},
            """a tool call needs a name and arguments, got {"id": "c1"}""",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[{"name": "add", "arguments": {}, "parameters": {}}])]},
            "has both 'arguments' and 'parameters'",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[call({})], function_call={"name": "add"})]},
            "has both 'tool_calls' and 'function_call'",
        ),
        ({"messages": [USER, assistant(tool_calls="add(1)")]}, "a tool call: not JSON: 'add(1)'"),
        ({"messages": [USER, assistant(tool_calls=7)]}, "tool calls must be a list of objects, got int"),
        ({"messages": [USER, assistant(tool_calls=[7])]}, "a tool call must be an object, got int"),
        ({"messages": [{**USER, "tool_calls": [call({})]}, REPLY]}, "only the assistant calls tools, got role 'user'"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "add(1)"}]},
            "turn 2 of 'conversations': a tool call: not JSON: 'add(1)'",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": ""}]},
            "a function_call needs a call, as JSON, in 'value'",
        ),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": '"add"'}]},
            "tool calls must be a list of objects, got str",
        ),
        (
            {"conversations": [HUMAN, {"from": "tool_call", "value": "{}", "tool_calls": [call({})]}]},
            "a call in its text and 'tool_calls'",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[{"function": {"name": "add"}, "arguments": {"a": 1}}])]},
            "turn 2 of 'messages': a tool call has 'function' and 'arguments' beside it; give the call in one of the two",
        ),
        (
            {"messages": [USER, assistant(tool_calls=[call({}) | {"name": "sub"}])]},
            "a tool call has 'function' and 'name' beside it",
        ),
        # beside the turns
        ({"messages": [USER, REPLY], "system": False}, "'system' must hold text, got bool"),
        ({"messages": [USER, REPLY], "tools": 0}, "'tools' must be a list of objects, or JSON of one"),
        ({"messages": [USER, REPLY], "tools": "add"}, "'tools': not JSON: 'add'"),
        ({"messages": [USER, REPLY], "tools": {"name": "add"}}, "'tools' must be a list of objects, or JSON of one"),
        ({"messages": [USER, REPLY], "functions": "[1]"}, "'functions' must be a list of objects, or JSON of one"),
        (
            {"messages": [USER, REPLY], "tools": [TOOL], "functions": [TOOL]},
            "the record has both 'tools' and 'functions'",
        ),
        (
            {"messages": [USER, REPLY], "chat_template_kwargs": [1]},
            "'chat_template_kwargs' must be an object, got list",
        ),
        (
            {"messages": [USER, REPLY], "chat_template_kwargs": {"tools": [TOOL]}},
            "must not hold 'tools', which the record gives otherwise",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(record, problem):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FORMATS.load("messages" if "messages" in record else "sharegpt").read(record)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


CHATML = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("read", "template", "expected"),
    [
        (read([USER, REPLY]), CHATML, []),
        (read([USER, {**REPLY, "name": "Al", "mood": 3}]), CHATML, ["mood", "name"]),
        (read([USER, {**REPLY, "name": "Al"}]), CHATML + "{{ messages[0].name }}", []),
        (read([USER, {**REPLY, "name": "Al"}]), CHATML + "{{ surname }}", ["name"]),
        (read([USER, {**REPLY, "tools": [TOOL]}]), CHATML + "{{ tools | tojson }}", ["tools"]),
        (read([USER, {**REPLY, "tools": [TOOL]}]), CHATML + "{{ messages[0]['tools'] }}", []),
        (read([USER, REPLY], tools=[TOOL]), CHATML, ["tools"]),
        (read([USER, REPLY], tools=[TOOL]), CHATML + "{{ tools | tojson }}", []),
        (read([USER, REPLY], chat_template_kwargs={"enable_thinking": False}), CHATML, ["enable_thinking"]),
        (
            read(
                [
                    USER,
                    assistant(tool_calls=[call({}, id="c1")]),
                    {"role": "tool", "content": "3", "tool_call_id": "c1"},
                ]
            ),
            CHATML + "{{ message.tool_calls }}",
            ["id", "tool_call_id"],
        ),
        (read([USER, {**REPLY, "weight": 0}]), CHATML, []),
        (Text([("a", True)]), CHATML, []),
    ],
)
def test_what_a_template_does_not_read_is_named(read, template, expected):
    assert content.unread(read, template) == expected
