"""JSON as it was meant: what a reader would have to guess, or would drop without a word, is refused.

Refused besides malformed JSON: a key that occurs twice in an object, NaN, Infinity and numbers so large that they would become
it, halves of surrogate pairs (no tokenizer takes them), numbers and nesting beyond the parser's limits.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

MAX_RECORD = 64 << 20  # bytes of one record; more is a file of another form, or without line ends
MAX_DEPTH = 100  # objects and lists in one another; far below what recursive functions can walk
_CHUNK = 1 << 20
_TOO_DEEP = f"is nested too deep (more than {MAX_DEPTH} lists and objects in one another)"
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice in an object, and only one of the two would be used")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null")


def _float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is beyond the largest number; write it as text")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def loads(line: bytes) -> Any:
    """The value of one line. Raises ``ValueError`` with a reason for the user."""
    return of_text(decoded(line).lstrip("\ufeff").rstrip())


def of_text(text: str) -> Any:
    """The value that a text stands for. Raises ``ValueError`` with a reason for the user."""
    try:
        return _checked(_DECODER.decode(text), text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg.startswith(("Extra data", "Expecting property name")):
            hint = "; one object per line, or one array, is expected: jq -c . FILE > FILE.jsonl"
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def decoded(line: bytes) -> str:
    """The text of some bytes. Raises ``ValueError`` with a reason for the user."""
    if b"\0" in line:
        raise ValueError(f"holds NUL bytes (column {line.index(0) + 1}): the file is damaged, or no UTF-8 text")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte 0x{line[error.start]:02x}, column {error.start + 1}); "
            "convert the file: iconv -f ITS_ENCODING -t UTF-8"
        ) from None


def _checked(value: Any, text: str) -> Any:
    if text.count("[") + text.count("{") > MAX_DEPTH:
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
        if level:
            raise ValueError(_TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"\\u{ord(half):04x} is half of a surrogate pair, which is no text; remove it, or write both halves"
            ) from None
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if "integer string conversion" in str(error):
        return "holds a number of too many digits; write it as text"
    return str(error)


class Array:
    """The items of an array that fills a file, one after the other; a few of them are in memory at a time.

    ``line`` is the number of the line that is being read. Iteration raises ``ValueError`` with a reason for the user.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.line = 1
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False

    def __iter__(self) -> Iterator[Any]:
        self._expect("[")
        if self._next() == "]":
            self._at += 1
        else:
            yield self._item()
            while self._expect(",]") == ",":
                yield self._item()
        if self._next():
            raise ValueError("not JSON: there is more after the end of the array")

    def _more(self) -> bool:
        """Read on, by as much again as is left; false at the end."""
        rest = self._text[self._at :]
        if self._ended:
            return False
        if len(rest) > MAX_RECORD:
            raise ValueError(f"an item of the array has more than {MAX_RECORD >> 20} MiB")
        chunk = self._stream.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._at = rest + self._decoder.decode(chunk, final=self._ended), 0
        except UnicodeDecodeError as error:
            self.line += rest.count("\n") + error.object[: error.start].count(b"\n")
            raise ValueError(
                f"not UTF-8 (byte 0x{error.object[error.start] if error.start < len(error.object) else 0:02x}); "
                "convert the file: iconv -f ITS_ENCODING -t UTF-8"
            ) from None
        return True

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _next(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _expect(self, characters: str) -> str:
        found = self._next()
        if found == "":
            raise ValueError("not JSON: the file ends within the array; is it complete?")
        if found not in characters:
            raise ValueError(f"not JSON: expecting {' or '.join(characters)}, got {found!r}")
        self._at += 1
        return found

    def _item(self) -> Any:
        if self._next() in ("", "]"):
            raise ValueError("not JSON: an item of the array is missing")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if cut and self._more():
                    continue
                self._advance(error.pos)
                raise ValueError(f"not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(_reason(error)) from None
            if end == len(self._text) and self._more():  # a number may go on
                continue
            text = self._text[self._at : end]
            self._advance(end)
            return _checked(value, text)
