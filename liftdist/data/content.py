"""What a record says, in one of two forms, and how conversations are read from the many forms that people have.

    Conversation   messages for the chat template: the replies are learned
    Text           pieces that are joined as they are, each learned or not

Every key of a message goes to the chat template, known or not; :func:`unread` names those that a template does not read.

Must not know tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from liftdist.data import json_text, templates

Record = Mapping[str, Any]

#: Names of roles, by how files call them.
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
    "observation": "tool", "function": "function", "ipython": "ipython", "function_call": "assistant",
    "tool_call": "assistant",
}  # fmt: skip
#: Fields beside the turns that a conversation takes.
OPTIONAL = ("system", "tools", "functions", "chat_template_kwargs")
_CALLS = ("function_call", "tool_call")  # speakers of ShareGPT whose text is a call
_OF_CALL = ("name", "arguments", "parameters")  # of a function that is called
_WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask")  # of a message: false or 0 is not learned
_OTHER_WEIGHTS = ("mask", "masked", "loss_weight", "loss_scale", "train_detail")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text")


Span = tuple[int, int, float]  # begin and end in the response, and the weight of its characters there, see weights.py


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the template
    masked: frozenset[int] = frozenset()  # numbers of replies that are not to be learned
    weights: tuple[Span, ...] = ()  # of the last message, sorted


@dataclass(frozen=True)
class Text:
    """``(text, whether it is learned)`` for each piece. An end of sequence follows the last."""

    pieces: Sequence[tuple[str, bool]]
    second_bos: bool = False  # the tokenizer puts its beginning of sequence even before one that the text writes
    weights: tuple[Span, ...] = ()  # of the last piece, sorted


Content = Conversation | Text


def digest(content: Content) -> int:
    """64 bits, signed: equal for records that say the same, whatever their source, and whatever of it is learned."""
    said = content.messages if isinstance(content, Conversation) else "".join(text for text, _ in content.pieces)
    text = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def conversation(record: Record, turns: Any, key: str, prompt: int = 0) -> Conversation:
    """The conversation in field ``key`` of a record, with its tools, system prompt and template arguments.

    Args:
        turns: what the field holds.
        prompt: the number of turns at the beginning whose replies are not learned.

    Raises:
        ValueError: malformed turns, parts that are no text, or no reply.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key!r} must be a list of turns, got {'an empty list' if turns == [] else _kind(turns)}")
    messages, masked = [], set()
    if not is_empty(system := record.get("system")):
        messages.append({"role": "system", "content": text_of(system, "'system'")})
    for number, turn in enumerate(turns, 1):
        made, is_learned = _message(turn, f"turn {number} of {key!r}")
        if messages and number == 1 and made["role"] == "system":
            raise ValueError(f"a system prompt stands beside {key!r} and in it; leave one of them out")
        if is_learned and number <= prompt:
            raise ValueError(
                f"turn {number} of {key!r} asks to be learned, but stands in the prompt; move it, or leave that out"
            )
        if made["role"] == "assistant" and (is_learned is False or number <= prompt):
            masked.add(len(messages))
        messages.append(made)
    if not any(message["role"] == "assistant" for message in messages[len(messages) - len(turns) + prompt :]):
        raise ValueError(f"{key!r} has no assistant turn, so there is nothing to train on")
    return Conversation(messages, _tools(record), _arguments(record), frozenset(masked))


def is_empty(value: Any) -> bool:
    """Whether a field of a record holds nothing; 0 and false are something."""
    return value is None or value in ("", [], {})


def parted(content: Content) -> tuple[Content, str]:
    """What stands before the last reply, and the reply."""
    if isinstance(content, Text):
        *before, (reply, _) = content.pieces
        return replace(content, pieces=before, weights=()), reply
    last = last_reply(content)
    prompt = replace(content, messages=content.messages[:last], masked=frozenset(), weights=())
    return prompt, content.messages[last]["content"]


def last_reply(content: Conversation) -> int:
    """The number of the message that is the last reply."""
    return max(number for number, message in enumerate(content.messages) if message["role"] == "assistant")


def unread(content: Content, template: str) -> list[str]:
    """What a conversation gives to its template, by name, and the template's text does not mention."""
    if isinstance(content, Text):
        return []
    arguments = set(content.arguments) - templates.variables(template)[0] if content.arguments else set()
    tools = {"tools"} if content.tools and not templates.mentions(template, "tools") else set()
    return sorted(arguments | tools | {key for key in set(_keys(content)) if not templates.reads(template, key)})


def _keys(content: Conversation) -> Iterator[str]:
    """The keys of messages and calls that not every template reads."""
    for message in content.messages:
        yield from (name for name in message if name not in ("role", "content"))
        for call in message.get("tool_calls", ()):
            for name in (*call, *call["function"]):
                if name not in ("type", "function", "name", "arguments"):
                    yield name


def _message(turn: Any, where: str) -> tuple[dict[str, Any], bool | None]:
    """A message as templates take it, and whether it is to be learned, if it says so."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be an object with 'role' and 'content', got {_kind(turn)}")
    given = {name: value for name, value in turn.items() if value is not None}
    speaker, content = _either(given, "role", "from", where), _either(given, "content", "value", where)
    if not isinstance(speaker, str):
        problem = f"a role that is text, got {_kind(speaker)}" if speaker is not None else "'role' or 'from'"
        raise ValueError(f"{where} needs {problem} (keys: {', '.join(map(str, turn)) or 'none'})")
    if speaker not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {speaker!r}")
    refuse_media(given, where)
    role = ROLES[speaker]
    is_learned = _is_learned(given, role, where)
    calls = _calls(given, where)
    if speaker in _CALLS:
        if calls:
            raise ValueError(f"{where}: a {speaker} holds a call in its text and 'tool_calls'; leave one of them out")
        calls, content = _calls({"tool_calls": content}, where), None
        if not calls:
            raise ValueError(f"{where}: a {speaker} needs a call, as JSON, in 'value'")
    if calls and role != "assistant":
        raise ValueError(f"{where}: only the assistant calls tools, got role {role!r}")
    if content is None and not calls:
        raise ValueError(f"{where} needs 'content' or 'value', or tool calls")
    message = {"role": role, "content": "" if content is None else text_of(content, where), **given}
    return message | ({"tool_calls": calls} if calls else {}), is_learned


def _either(given: dict[str, Any], name: str, other: str, where: str) -> Any:
    """Take what goes by one of two names."""
    if name in given and other in given:
        raise ValueError(f"{where} has both {name!r} and {other!r}; leave one of them out")
    return given.pop(name, given.pop(other, None))


def _is_learned(given: dict[str, Any], role: str, where: str) -> bool | None:
    """Take what says whether a message is learned; None if nothing does."""
    for name in _OTHER_WEIGHTS:
        if name in given:
            raise ValueError(f"{where}: {name!r} is not used; say by 'weight', 0 or 1, whether a reply is learned")
    marks = dict[str, bool]()
    for name in [name for name in _WEIGHTS if name in given]:
        value = given.pop(name)
        if value not in (0, 1) or isinstance(value, str):
            raise ValueError(f"{where}: {name!r} must be 0 or 1, or true or false, got {value!r:.40}")
        if value and role != "assistant":
            raise ValueError(f"{where}: {name!r} asks to learn a turn of role {role!r}, but only replies are learned")
        marks[name] = bool(value)
    if len(set(marks.values())) > 1:
        raise ValueError(
            f"{where}: {' and '.join(map(repr, marks))} say of a reply that it is learned, and that it is not"
        )
    return all(marks.values()) if marks else None


def refuse_media(holder: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` if a record or a message has images, audio or video beside its text."""
    for name in _MEDIA:
        if holder.get(name):
            raise ValueError(f"{where} has {name!r}, and only text can be learned; remove the record or the field")


def text_of(content: Any, where: str) -> str:
    """The text of a content, which may be a list of parts. Raises ``ValueError`` for parts that are no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    raise ValueError(f"{where} must hold text, got {_kind(content)}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: a part of its content must be text or an object, got {_kind(part)}")
    given = {name: value for name, value in part.items() if value is not None}
    kind = given.pop("type", "text")
    if kind in ("thinking", "reasoning"):
        raise ValueError(f"{where} has a part of type {kind!r}; give it as 'reasoning_content' of the message")
    if kind not in _TEXT_PARTS or not isinstance(given.get("text"), str):
        raise ValueError(
            f"{where} has a part of type {kind!r}, and only text can be learned; remove the record or the part"
        )
    if others := [name for name in given if name != "text"]:
        raise ValueError(f"{where} has a part of text with {', '.join(others)}, which nothing reads; remove it")
    return str(given["text"])


def _calls(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Take a message's tool calls."""
    if "tool_calls" in given and "function_call" in given:
        raise ValueError(f"{where} has both 'tool_calls' and 'function_call'; leave one of them out")
    calls = given.pop("tool_calls", None)
    if "function_call" in given:  # the older form
        calls = [given.pop("function_call")]
    calls = _parsed(calls, f"{where}: a tool call")
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool calls must be a list of objects, got {_kind(calls)}")
    return [_call(_parsed(call, f"{where}: a tool call"), where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in the form ``{"type": "function", "function": {"name", "arguments"}}`` with arguments as an object."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call must be an object, got {_kind(call)}")
    others = {name: value for name, value in call.items() if value is not None}
    if (kind := others.pop("type", "function")) != "function":
        raise ValueError(f"{where}: a tool call must be of type 'function', got {kind!r}")
    function = others.pop("function", None)
    if function is None:  # without the envelope
        function = {name: others.pop(name) for name in _OF_CALL if name in others}
    elif beside := [name for name in _OF_CALL if name in others]:
        raise ValueError(
            f"{where}: a tool call has 'function' and {beside[0]!r} beside it; give the call in one of the two"
        )
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call needs a name and arguments, got {json.dumps(call, default=str)[:80]}")
    function = dict(function)
    arguments = _either(function, "arguments", "parameters", f"{where}: the call of {function['name']}")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}: arguments of the call of {function['name']}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: arguments of the call of {function['name']} must be an object, got {_kind(arguments)}"
        )
    return {"type": "function", **others, "function": {**function, "arguments": arguments}}


def _tools(record: Record) -> list[Any] | None:
    """The tools that the model may call, each as ``{"type": "function", "function": {"name", ...}}``."""
    keys = [key for key in ("tools", "functions") if not is_empty(record.get(key))]
    if len(keys) > 1:
        raise ValueError("the record has both 'tools' and 'functions'; leave one of them out")
    key = keys[0] if keys else "tools"
    tools = _parsed(record.get(key), repr(key))
    if is_empty(tools):
        return None
    tools = [_parsed(tool, repr(key)) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{key!r} must be a list of objects, or JSON of one")
    return [tool if "function" in tool or "name" not in tool else _enveloped(tool) for tool in tools]


def _enveloped(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _arguments(record: Record) -> Mapping[str, Any]:
    arguments = _parsed(record.get("chat_template_kwargs"), "'chat_template_kwargs'")
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"'chat_template_kwargs' must be an object, got {_kind(arguments)}")
    if taken := [name for name in templates.RESERVED if name in arguments]:
        raise ValueError(f"'chat_template_kwargs' must not hold {taken[0]!r}, which the record gives otherwise")
    return arguments


def _parsed(value: Any, what: str) -> Any:
    """What JSON in a text stands for; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json_text.of_text(value.strip()) if value.strip() else None
    except ValueError as error:
        reason = f"not JSON: {value[:40]!r}" if str(error).startswith("not JSON") else error
        raise ValueError(f"{what}: {reason}") from None


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
