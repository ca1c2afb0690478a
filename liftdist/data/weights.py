"""Weights of tokens, from a field of the record: spans of characters of its response.

    {"prompt": "2 + 2 =", "completion": "2 + 2 is 4", "weights": [[9, 10, 4.0], [0, 6, 0.2]]}

A span is ``[begin, end, weight]``, in characters as Python counts them: ``response[begin:end]``. Characters in no span weigh 1.
Spans do not depend on a tokenizer; a token that holds characters of several weights has the largest of them. Blanks that it
begins with do not count, unless it holds nothing else, nor do characters outside of the response. A token of weight 0 is not
learned. What follows the response, such as the end of the sequence, weighs 1.

Fault-aware fine-tuning (arXiv 2503.16913) weighs what tells a right program from a wrong one. There the weights change with the
model's certainty; here they are those of the data. Must not know tokenizers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from liftdist.data import json_text
from liftdist.data.content import Content, Conversation, Span


def weighted(content: Content, response: Any, given: Any, field: str) -> Content:
    """The content of a record with the weights of its response.

    Args:
        response: what the field of the response holds.
        given: what ``field`` holds; None: all weights are 1.

    Raises:
        ValueError: no spans, or spans that are not of the response's text.
    """
    if given is None:
        return content
    if not isinstance(response, str):
        raise ValueError(f"{field!r} holds weights, which are of a response that is one text, and this is none")
    spans = _spans(given, field, len(response))
    if isinstance(content, Conversation):
        as_it_is = content.messages[-1]["content"] == response
    else:
        as_it_is = content.pieces[-1][0].startswith(response)
    if not as_it_is:
        raise ValueError(f"{field!r} holds weights by characters, but the format changes the response; leave them out")
    return dataclasses.replace(content, weights=spans)


def _spans(given: Any, field: str, length: int) -> tuple[Span, ...]:
    if isinstance(given, str):  # a cell of a table
        try:
            given = json_text.of_text(given)
        except ValueError:
            raise ValueError(f"{field!r} must be a list of [begin, end, weight], got {given[:40]!r}") from None
    if not isinstance(given, list) or not all(isinstance(span, list | tuple) and len(span) == 3 for span in given):
        raise ValueError(f"{field!r} must be a list of [begin, end, weight]")
    found = []
    for begin, end, weight in given:
        shown = f"{field!r}: [{begin}, {end}, {weight}]"
        if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in (begin, end, weight)):
            raise ValueError(f"{shown} must be two positions and a number")
        if not 0 <= begin < end <= length or begin != int(begin) or end != int(end):
            raise ValueError(f"{shown} is no span of the response, which has {length} characters")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{shown}: a weight must be finite and at least 0")
        found.append((int(begin), int(end), float(weight)))
    found.sort()
    for (_, end, _), (begin, *_) in itertools.pairwise(found):
        if begin < end:
            raise ValueError(f"{field!r}: two spans hold character {begin}; a character has one weight")
    return tuple(found)


def moved(spans: Sequence[Span], offset: int) -> list[Span]:
    return [(begin + offset, end + offset, weight) for begin, end, weight in spans]


def place(text: str, begin: int, end: int, response: str) -> int:
    """Where a response stands in the reply ``text[begin:end]``, which may lack blanks at its edges.

    Raises:
        ValueError: not there as it is, or more than once.
    """
    visible = response.strip()
    before = len(response) - len(response.lstrip())
    if text.startswith(visible, begin):
        return begin - before
    found = text.find(visible, begin, end)
    if found < 0:
        raise ValueError("the chat template changes the reply, so that weights by its characters have no place")
    if text.find(visible, found + 1, end) >= 0:
        raise ValueError("the reply stands in the chat template's text more than once: its weights have no one place")
    return found - before


def of_token(text: str, begin: int, end: int, response: tuple[int, int], spans: Sequence[Span]) -> float:
    """The weight of the token ``text[begin:end]``.

    Args:
        response: begin and end of the response in ``text``.
        spans: of ``text``, sorted.
    """
    begin, end = max(begin, response[0]), min(end, response[1])
    begin += len(text[begin:end]) - len(text[begin:end].lstrip()) if text[begin:end].strip() else 0
    if begin >= end:
        return 1.0
    found = [(max(begin, a), min(end, b), weight) for a, b, weight in spans if a < end and begin < b]
    weights = [weight for *_, weight in found]
    if sum(b - a for a, b, _ in found) < end - begin:
        weights.append(1.0)  # of the characters in no span
    return max(weights)
