"""Where the replies stand in a rendered conversation, for any chat template.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\n...
                                                            |learned            |

A reply begins after the prompt that the template writes for it (``add_generation_prompt``) and ends after the token by which the
model stops. Both are found in the rendering of the *whole* conversation:

- Messages between replies bound them: their positions come from a second rendering in which they carry marks, and which must
  equal the first once the marks are removed.
- The turn's end is found by the rendering of the conversation up to the reply, in which it is the last.
- A template with ``{% generation %}`` blocks says where replies are by itself.

Everything here is about text; :mod:`liftdist.data.chat` makes tokens of it. Must not know tokenizers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # messages, whether the prompt for a reply follows

_MARK = "qX7z{}Zq"  # letters and digits, which no template escapes, and in no conversation
_THOUGHT = "</think>"  # ends reasoning
_SAID = ("content", "tool_calls")  # what a reply says and does, and all prompts after it tell
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = {"role": "user", "content": _MARK.format("")}


@dataclass(frozen=True)
class Reply:
    """One reply in the rendered text: it is learned from ``begin`` to ``end``."""

    message: int  # its number in the conversation
    begin: int
    end: int
    is_asked_otherwise: bool = (
        False  # before the newest message, too, the template writes another prompt than it asks with
    )
    stop: str = ""  # text to add after ``end``, where the conversation ends without a token by which the model stops


def find(
    messages: Sequence[Message], render: Render, special: re.Pattern[str], stops: Sequence[str], wanted: Sequence[int]
) -> list[Reply]:
    """The replies, in order.

    Args:
        wanted: numbers of the messages that are replies to learn.
        special: matches every special token of the tokenizer.
        stops: tokens by which generation stops, the tokenizer's end of sequence first.

    Raises:
        Changed: a reply that is to be learned is not all there; it may be when it is the newest message.
        ValueError: the template drops or changes another message, or a reply cannot be told from the rest.
    """
    whole = render(messages, False)
    bounds = _positions(messages, render, whole)
    found, reached = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            reached = max(reached, bounds[number][1]) if number in bounds else reached
            continue
        later = [bounds[n][0] for n in range(number + 1, len(messages)) if n in bounds and bounds[n][0] >= reached]
        limit = min(later, default=len(whole))
        reply = _reply(number, messages, render, whole, reached, limit, special, stops if number in wanted else None)
        if number in wanted:
            found.append(reply)
            _check_complete(number, message, whole[reply.begin : reply.end])
        else:
            _check_shown(number, messages, render, whole[reply.begin : reply.end])
        reached = reply.end
    return found


def check_prompt(messages: Sequence[Message], render: Render) -> None:
    """Raises ``ValueError`` if the prompt that follows from messages drops one, or what a reply says or calls."""

    def prompt(some: Sequence[Message], _: bool) -> str:
        return render(some, True)

    whole = prompt(messages, True)
    _positions(messages, prompt, whole)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            _check_shown(number, messages, render, whole)


def _positions(messages: Sequence[Message], render: Render, whole: str) -> dict[int, tuple[int, int]]:
    """Begin and end of the text of every message that is no reply, or follows a reply as another one."""
    marked = list(messages)
    for number, message in enumerate(messages):
        text = message.get("content")
        if (
            isinstance(text, str)
            and text.strip()
            and (message["role"] != "assistant" or _follows_reply(messages, number))
        ):
            middle = _middle(text)
            marked[number] = {**message, "content": text[:middle] + _MARK.format(number) + text[middle:]}
    rendered = render(marked, False)
    pattern = _MARK.format(r"(\d+)")
    pieces = re.split(pattern, rendered)
    if "".join(pieces[::2]) != whole:
        raise ValueError("the chat template changes messages depending on their text; use another data.chat_template")
    found: dict[int, tuple[int, int]] = {}
    position = 0
    for piece, number in zip(pieces[::2], [*map(int, pieces[1::2]), -1], strict=True):
        position += len(piece)
        if number < 0:
            continue
        text = str(messages[number]["content"])
        middle = _middle(text)
        before, after = text[:middle].lstrip(), text[middle:].rstrip()
        begin = position - len(before) if whole.endswith(before, 0, position) else position
        end = position + len(after) if whole.startswith(after, position) else position
        found.setdefault(number, (begin, end))
    for number, message in enumerate(messages):
        if marked[number] is not message and number not in found:
            raise ValueError(
                f"the chat template drops message {number + 1}, of role {message['role']!r}; leave it out, or use another "
                "data.chat_template"
            )
    return found


def _follows_reply(messages: Sequence[Message], number: int) -> bool:
    return number > 0 and messages[number - 1]["role"] == "assistant"


def _middle(text: str) -> int:
    """A position within the text, not at its edges, where templates strip and compare."""
    begin = len(text) - len(text.lstrip())
    return begin + (len(text.strip()) + 1) // 2


def _reply(
    number: int,
    messages: Sequence[Message],
    render: Render,
    whole: str,
    reached: int,
    limit: int,
    special: re.Pattern[str],
    stops: Sequence[str] | None,
) -> Reply:
    """The reply in the text between the messages before and after it, ``whole[reached:limit]``; ``stops`` if it is learned."""
    before, newest = render(messages[:number], True), render(messages[: number + 1], False)
    if whole.startswith(before) and newest.startswith(before):
        begin, turn = len(before), newest[len(before) :]
    else:  # an earlier turn is another text than the newest
        prompt = before[_common(before, render(messages[:number], False)) :]
        begin, header = _after_header(whole, reached, limit, prompt, special)
        turn = newest[newest.rfind(header) + len(header) :]
    end = begin + _end_of_turn(whole[begin:limit], turn, special)
    otherwise = not newest.startswith(before)
    ends = special.search(whole, begin, end) and not special.sub("\0", whole[begin:end]).rpartition("\0")[2].strip()
    if ends or stops is None:
        return Reply(number, begin, end, otherwise)
    # the template ends no turn: the model stops by the token that begins the next one
    if limit < len(whole):
        if (following := special.search(whole, end, limit)) is not None and following[0] in stops:
            return Reply(number, begin, following.end(), otherwise)
    else:
        before_next = render([*messages, _PROBE], False).rpartition(_PROBE["content"])[0]
        following_tokens = special.findall(before_next)
        if following_tokens and following_tokens[-1] in stops:
            return Reply(number, begin, end, otherwise, following_tokens[-1])
    raise ValueError(
        "the chat template writes no token after a reply by which the model would stop; use another data.chat_template"
    )


def _common(first: str, second: str) -> int:
    """Length of the common beginning."""
    size = min(len(first), len(second))
    if first[:size] == second[:size]:
        return size
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _after_header(whole: str, reached: int, limit: int, prompt: str, special: re.Pattern[str]) -> tuple[int, str]:
    """Where the prompt for a reply ends, and the part of it that is there: in history it may lack its end, such as `<think>`."""
    cuts = {match.end() for match in re.finditer(r"\s+", prompt)} | {match.end() for match in special.finditer(prompt)}
    for cut in sorted(cuts | {len(prompt)}, reverse=True):
        header = prompt[:cut]
        if header.strip() and (place := whole.find(header, reached, limit)) >= 0:
            return place + cut, header
    raise ValueError(
        "the chat template does not write its own prompt for a reply before a reply; use another data.chat_template"
    )


def _end_of_turn(rest: str, turn: str, special: re.Pattern[str]) -> int:
    """Length of the reply at the beginning of ``rest``; ``turn`` is the same reply, and its end, as the newest message."""
    if rest.startswith(turn):
        return len(turn)
    # the newest turn ends by more than an earlier one does
    shared = _common(rest, turn)
    while shared > 0 and not _at_token_border(rest, shared, special):
        shared -= 1
    if shared and not special.sub("", turn[shared:]).strip() and special.search(turn, shared):
        return shared
    # an earlier turn is another text than the newest: without its reasoning
    low, high = 0, len(turn)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if turn[len(turn) - middle :] in rest else (low, middle - 1)
    suffix = turn[len(turn) - low :]
    if special.sub("", suffix).strip():
        return rest.rindex(suffix) + low
    raise ValueError(
        "the end of a reply cannot be found in the rendering of the chat template; use another data.chat_template"
    )


def _at_token_border(text: str, place: int, special: re.Pattern[str]) -> bool:
    return not any(
        match.start() < place < match.end() for match in special.finditer(text, max(0, place - 64), place + 64)
    )


def _check_complete(number: int, message: Message, learned: str) -> None:
    """Raises :class:`Changed` unless all that the user gave of a reply is in the learned text."""
    if key := _missing(message, learned, _SAID + _REASONING):
        raise Changed(f"the chat template drops {key} of message {number + 1}, or a part of it")
    content = message.get("content")
    if isinstance(content, str) and 0 < content.count(_THOUGHT) < learned.count(_THOUGHT):
        raise ValueError(
            f"the chat template writes {_THOUGHT} once more than message {number + 1} has it; give the reasoning as "
            "'reasoning_content' of the message"
        )


def _check_shown(number: int, messages: Sequence[Message], render: Render, shown: str) -> None:
    """Raises ``ValueError`` unless what a reply says and calls, its reasoning aside, is in the text before a later one; or, where
    the template leaves things out of the past, in the text in which it is the newest."""
    content = messages[number].get("content")
    said = {**messages[number], "content": content.rpartition(_THOUGHT)[2] if isinstance(content, str) else content}
    if _missing(said, shown, _SAID) and (key := _missing(said, render(messages[: number + 1], False), _SAID)):
        raise ValueError(
            f"the chat template drops {key} of message {number + 1}, or a part of it; use another data.chat_template, which "
            "keeps it"
        )


class Changed(ValueError):
    """A part of a reply is not in the rendering of the whole conversation."""


def given(message: Message) -> list[tuple[str, Any]]:
    """The texts, numbers and switches of a reply that must be learned, each with the name of its key."""
    found = [(key, message[key]) for key in ("content", *_REASONING) if isinstance(message.get(key), str)]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        found += [
            ("tool_calls", function.get("name")),
            *(("tool_calls", one) for one in _inner(function.get("arguments"))),
        ]
    return found


def _inner(value: Any) -> Iterator[Any]:
    """The names and values in a value of JSON. Tables hold null where a row has no such name: it says nothing."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if inner is not None:
                yield from (name, *_inner(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inner(inner)
    elif value is not None:
        yield value


def _missing(message: Message, shown: str, keys: Sequence[str]) -> str | None:
    """The first of the keys of a reply of which something does not stand in a text as often as the reply says it.

    A text stands there as it is or as JSON writes it, without the marks of reasoning; blanks do not count.
    """
    squeezed = _squeezed(shown)
    said = [
        (key, frozenset(map(_squeezed, _forms(part))))
        for key, value in given(message)
        if key in keys
        for part in (re.split(r"</?think(?:ing)?>", value) if isinstance(value, str) else [value])
    ]
    often = Counter(forms for key, forms in said if key in _SAID)  # reasoning may have two names, and be written once
    for key, forms in said:
        if "" not in forms and sum(map(squeezed.count, forms)) < (often[forms] if key in _SAID else 1):
            return key
    return None


def _forms(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]]
    return [str(value), json.dumps(value)]


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
