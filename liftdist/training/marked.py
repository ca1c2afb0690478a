"""Samples for people: what is learned is in colour or in brackets on a terminal, and marked on a page of HTML.

What would disturb a terminal or a page, and the marks themselves where they stand in a text, are written as Python writes them.
"""

from __future__ import annotations

import html
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from liftdist.data import pieces
from liftdist.data.pieces import Decode, Piece

OPEN, CLOSE, NEW_LINE = "⟦", "⟧", "↵"
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
PAGE = "<!doctype html>\n<!-- liftdist data -->\n"  # begins every page
_STYLE = """
:root { color-scheme: light dark; --mark: #c6f0cf; --line: #8888; }
@media (prefers-color-scheme: dark) { :root { --mark: #1d5c2e; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre, .text { font: 13px/1.6 ui-monospace, monospace; border: 1px solid var(--line); border-radius: 4px; padding: .6rem; }
pre { overflow-x: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
mark { background: var(--mark); color: inherit; }
.text span:hover { outline: 1px solid; }
.new::before { content: "\\21b5"; opacity: .5; }
h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
"""


@dataclass(frozen=True)
class Shown:
    """A sample to be shown, or a record that has none.

    Args:
        name: its place, for its title.
        learned: whether each token is.
        note: what became of the record.
    """

    name: str
    ids: Sequence[int]
    learned: Sequence[bool]
    note: str = ""

    @property
    def title(self) -> str:
        size = f"{len(self.ids)} tokens, {sum(self.learned)} learned" if self.ids else ""
        return f"{self.name}: {'; '.join(filter(None, (size, self.note)))}"


def has_colours() -> bool:
    """Whether standard output is a terminal whose user wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str, marks: str = "") -> str:
    """The text with everything escaped that is not written but obeyed: controls, and what changes the direction of a line."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character in marks or (character not in "\n\t" and _is_obeyed(character))
        else character
        for character in text
    )


def _is_obeyed(character: str) -> bool:
    directions = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
        or unicodedata.bidirectional(character) in directions
    )


def lines(sample: Shown, decode: Decode, in_colour: bool) -> list[str]:
    """The sample for a terminal."""
    begin, end = (_GREEN, _PLAIN) if in_colour else (OPEN, CLOSE)
    text = ""
    for piece in pieces.runs(decode, sample.ids, sample.learned):
        shown = visible(piece.text, OPEN + CLOSE + NEW_LINE).replace("\n", f"{NEW_LINE}\n")
        if piece.learned and in_colour:  # for each line: a pager may show any of them first
            shown = re.sub(r"[^\n]+", lambda line: f"{begin}{line[0]}{end}", shown)
        elif piece.learned:
            ends_line = shown.endswith("\n")  # the break after the mark of a new line is layout
            shown = f"{begin}{shown.removesuffix(chr(10))}{end}" + "\n" * ends_line
        text += shown
    return [visible(sample.title), *(f"  {line}" for line in text.removesuffix("\n").split("\n") if sample.ids)]


def page(title: str, figures: Sequence[str], samples: Sequence[Shown], decode: Decode) -> str:
    """A page that needs nothing else: no script, no network."""
    blocks = []
    for sample in samples:
        text = "".join(_token(piece) for piece in pieces.tokens(decode, sample.ids, sample.learned))
        blocks.append(f"<h2>{_escaped(sample.title)}</h2>\n" + (f'<div class="text">{text}</div>\n' if text else ""))
    return (
        f'{PAGE}<html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{_escaped(title)}</h1>\n<pre>{_escaped(chr(10).join(figures))}</pre>\n"
        f"<p>What is learned is <mark>marked</mark>. Hover over a token for its id.</p>\n{''.join(blocks)}</body></html>\n"
    )


def _token(piece: Piece) -> str:
    ids, text = " ".join(map(str, piece.ids)), _escaped(piece.text).replace("\n", '<b class="new"></b>\n')
    return f'<span title="{ids}">{f"<mark>{text}</mark>" if piece.learned else text}</span>'


def _escaped(text: str) -> str:
    return html.escape(visible(text))
