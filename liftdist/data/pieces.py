"""The text that tokens stand for, in pieces that are learned and pieces that are not.

The text of a sample is that of all its tokens, decoded together: special tokens are written, nothing is cleaned up. Pieces are
parts of it: joined they are the text, to the character, whatever a tokenizer does at the beginning of a text or across tokens.
A character that is spread over several tokens is in the piece of the last of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[Sequence[int]], str]
_BEFORE = 8  # tokens that are decoded with those that follow: what a text begins with may be written otherwise


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other, and their part of the text."""

    text: str
    ids: tuple[int, ...]
    learned: bool  # whether any of them is


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """What makes text of a fast tokenizer's tokens."""
    backend = tokenizer.backend_tokenizer

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(list(ids), skip_special_tokens=False)

    return decode


def runs(decode: Decode, ids: Sequence[int], learned: Sequence[bool]) -> list[Piece]:
    """The text as the longest pieces that are learned as a whole, or not at all."""
    ends = [n for n in range(1, len(ids)) if learned[n] != learned[n - 1]] + [len(ids)]
    return list(_cut(decode, ids, learned, ends))


def tokens(decode: Decode, ids: Sequence[int], learned: Sequence[bool]) -> list[Piece]:
    """A piece for each token; tokens that share a character are one."""
    found: list[Piece] = []
    waiting: tuple[int, ...] = ()  # tokens without a character of their own, before the one that ends it
    one_learned = False
    for piece in _cut(decode, ids, learned, range(1, len(ids) + 1)):
        waiting, one_learned = (*waiting, *piece.ids), one_learned or piece.learned
        if piece.text:
            found.append(Piece(piece.text, waiting, one_learned))
            waiting, one_learned = (), False
    return [*found, Piece("", waiting, one_learned)] if waiting else found


def _cut(decode: Decode, ids: Sequence[int], learned: Sequence[bool], ends: Sequence[int]) -> Iterator[Piece]:
    text = decode(ids)
    places = [*_places(decode, ids, text, ends[:-1]), len(text)]
    for (begin, end), (start, stop) in zip(
        itertools.pairwise([0, *ends]), itertools.pairwise([0, *places]), strict=True
    ):
        yield Piece(text[start:stop], tuple(ids[begin:end]), any(learned[begin:end]))


def _places(decode: Decode, ids: Sequence[int], text: str, ends: Sequence[int]) -> Iterator[int]:
    """How much of ``text`` is that of ``ids[:end]``, for each end."""
    known, place = 0, 0  # ``text[:place]`` is that of ``ids[:known]``, and no character is left unfinished
    for end in ends:
        begin = max(0, known - _BEFORE)
        before, longer = decode(ids[begin:known]), decode(ids[begin:end])
        new = longer[len(before) :] if longer.startswith(before) else decode(ids[:end])[place:]
        size = _common(new, text[place : place + len(new)])
        yield place + size
        if size == len(new):
            known, place = end, place + size


def _common(first: str, second: str) -> int:
    """Length of the common beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
