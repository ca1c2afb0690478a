"""What a page of Markdown holds: fenced blocks with the mark before them, code in the text, links, headings."""

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"```(\w*)\s*$")
_MARK = re.compile(r"<!-- (test|recorded): (.+) -->$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``<!-- test: run -->`` before it is the mark ``("test", "run")``."""

    page: Path
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """``(command, what it prints)`` of a ``console`` block, in which commands follow ``$``; of others nothing is printed."""
        if self.language != "console":
            joined = self.text.replace("\\\n", " ")
            return [(line, "") for line in joined.splitlines() if line.strip()]
        found: list[tuple[str, str]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found


@dataclass(frozen=True)
class Page:
    path: Path
    blocks: list[Block]
    prose: list[tuple[int, str]]  # number and text of every line outside of blocks and front matter

    @property
    def spans(self) -> list[tuple[int, str]]:
        """Line and text of code inside sentences and tables."""
        return [(number, code) for number, line in self.prose for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", line)]

    @property
    def links(self) -> list[tuple[int, str]]:
        return [
            (number, target) for number, line in self.prose for target in _LINK.findall(re.sub(r"`[^`]*`", "", line))
        ]

    @property
    def anchors(self) -> set[str]:
        """Of the headings, as GitHub and the site make them."""
        titles = [line.lstrip("# ") for _, line in self.prose if re.match(r"#+ ", line)]
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def parse(path: Path) -> Page:
    lines = path.read_text().splitlines()
    blocks, prose, number = [], [], 0
    if lines and lines[0] == "---":
        number = lines.index("---", 1) + 1
    before = ""  # the last line that was not empty
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            end = lines.index("```", number + 1)
            mark = _MARK.match(before)
            text = "\n".join(lines[number + 1 : end]) + "\n"
            blocks.append(Block(path, number + 1, fence[1], text, (mark[1], mark[2]) if mark else None))
            before, number = "", end
        else:
            prose.append((number + 1, lines[number]))
            before = lines[number] if lines[number].strip() else before
        number += 1
    return Page(path, blocks, prose)
