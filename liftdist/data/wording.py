"""The user's own wording: a text with ``{field}`` where a field of the record stands, and ``{{`` and ``}}`` for braces."""

from __future__ import annotations

import re
from dataclasses import dataclass

from liftdist.data.sources import Record
from liftdist.errors import UserError

_TOKEN = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class Template:
    """Texts and the fields between them: one text more than fields."""

    key: str  # of the setting
    texts: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def parse(cls, key: str, text: str) -> Template:
        """Raises ``UserError`` for a brace that is not one of a pair around a name."""
        texts, names = [""], []
        for number, piece in enumerate(pieces := _TOKEN.split(text)):
            if number % 2 == 0 or piece in ("{{", "}}"):
                texts[-1] += piece if number % 2 == 0 else piece[0]
            elif piece in ("{", "}", "{}"):
                around = "".join(pieces[:number])[-20:] + piece + "".join(pieces[number + 1 :])[:20]
                raise UserError(f"{key}: {piece} in {around!r} is no {{field}}; write {{{{ and }}}} for braces")
            else:
                names.append(piece[1:-1])
                texts.append("")
        return cls(key, tuple(texts), tuple(names))

    @classmethod
    def of_field(cls, key: str, name: str) -> Template:
        """The field alone."""
        return cls(key, ("", ""), (name,))

    @property
    def fields(self) -> frozenset[str]:
        return frozenset(self.names)

    @property
    def only_field(self) -> str | None:
        """The field that stands here alone; None if there is other text, or another field."""
        return self.names[0] if self.texts == ("", "") else None

    def fill(self, record: Record) -> str:
        """The text of a record. Raises ``ValueError`` if it lacks a field, or one is not text."""
        filled = self.texts[0]
        for name, text in zip(self.names, self.texts[1:], strict=True):
            value = record.get(name)
            if not isinstance(value, str):
                found = (
                    f"{type(value).__name__}, not text"
                    if value is not None
                    else "null"
                    if name in record
                    else "missing"
                )
                fields = ", ".join(map(str, record)) or "none"
                raise ValueError(
                    f"field {name!r} of {self.key} is {found} (fields: {fields}); {{{{ and }}}} are braces"
                )
            filled += value + text
        return filled
