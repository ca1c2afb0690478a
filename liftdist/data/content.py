"""What a record says, in one of two forms, and how conversations are read from the many forms that people have.

    Conversation   messages for the chat template: the replies are learned
    Text           pieces that are joined as they are, each learned or not

Must not know tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]

#: Names of roles, by how files call them.
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
    "observation": "tool", "function": "function", "ipython": "ipython", "function_call": "assistant",
    "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # speakers of ShareGPT whose text is a call
_WEIGHTS = ("weight", "train")  # of a message: false or 0 is not learned


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the template
    masked: frozenset[int] = frozenset()  # numbers of replies that are not to be learned


@dataclass(frozen=True)
class Text:
    """``(text, whether it is learned)`` for each piece. An end of sequence follows the last."""

    pieces: Sequence[tuple[str, bool]]


Content = Conversation | Text


def conversation(record: Record, turns: Any, key: str) -> Conversation:
    """The conversation in field ``key`` of a record, with its tools, system prompt and template arguments.

    Raises:
        ValueError: malformed turns, images or audio, or no reply.
    """
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if isinstance(turns, list) else "null" if turns is None else type(turns).__name__
        raise ValueError(f"{key!r} must be a list of turns, got {found}")
    messages, masked = [], set()
    if record.get("system"):
        messages.append({"role": "system", "content": text_of(record["system"], "system")})
    for number, turn in enumerate(turns, 1):
        made, is_learned = _message(turn, f"turn {number} of {key!r}")
        if made["role"] == "system" and messages and messages[0]["role"] == "system" and number == 1:
            raise ValueError(f"a system prompt stands beside {key!r} and in it")
        if not is_learned:
            masked.add(len(messages))
        messages.append(made)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{key!r} has no assistant turn, so there is nothing to train on")
    return Conversation(messages, _tools(record), _arguments(record), frozenset(masked))


def _message(turn: Any, where: str) -> tuple[dict[str, Any], bool]:
    """A message as templates take it, and whether it may be learned."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} must be an object, got {type(turn).__name__}")
    given = {name: value for name, value in turn.items() if value is not None}  # tables have null for what is absent
    speaker = given.pop("role", None) or given.pop("from", None)
    if not isinstance(speaker, str):
        raise ValueError(f"{where} needs 'role' or 'from' (keys: {', '.join(map(str, turn)) or 'none'})")
    if speaker not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {speaker!r}")
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    is_learned = all(bool(given.pop(name)) for name in _WEIGHTS if name in given)
    message = {"role": ROLES[speaker], **given}
    if speaker in _CALLS:
        message["tool_calls"], content = _calls_in(text_of(content, where), where), ""
    if "function_call" in message:  # the older form
        message["tool_calls"] = [message.pop("function_call")]
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, where) for call in _json(message["tool_calls"], where)]
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"{where} needs 'content' or 'value', or tool calls")
    message["content"] = "" if content is None else text_of(content, where)
    return message, is_learned


def text_of(content: Any, where: str) -> str:
    """The text of a content, which may be a list of parts. Raises ``ValueError`` for parts that are no text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    raise ValueError(f"{where} must be text, got {'null' if content is None else type(content).__name__}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"{where} has a part of type {kind!r}: only text can be learned; remove the record or the part")


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in the form ``{"type": "function", "function": {"name", "arguments"}}`` with arguments as an object."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call must be an object, got {type(call).__name__}")
    function = dict(call.get("function") or {name: call[name] for name in ("name", "arguments") if name in call})
    if not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call needs a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise ValueError(
                f"{where}: arguments of the call of {function['name']} are not JSON: {arguments[:40]!r}"
            ) from None
    if isinstance(arguments, Mapping):  # tables have null for the arguments of other functions
        arguments = {name: value for name, value in arguments.items() if value is not None}
    others = {
        name: value
        for name, value in call.items()
        if name not in ("function", "name", "arguments", "type") and value is not None
    }
    return {"type": "function", **others, "function": {**function, "arguments": arguments}}


def _calls_in(text: str, where: str) -> list[Any]:
    calls = _json(text, where)
    return calls if isinstance(calls, list) else [calls]


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(f"{where}: a tool call is not JSON: {value[:40]!r}") from None


def _tools(record: Record) -> list[Any] | None:
    tools = record.get("tools") or record.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(f"'tools' is not JSON: {str(tools)[:40]!r}") from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' must be a list of objects")
    return tools


def _arguments(record: Record) -> Mapping[str, Any]:
    arguments = record.get("chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"'chat_template_kwargs' must be an object, got {type(arguments).__name__}")
    return {name: value for name, value in arguments.items() if value is not None}
