"""The figures of one source's samples, as lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from liftdist.data.content import Content, Conversation, Text
from liftdist.data.tokenised import SPLIT, Samples
from liftdist.data_settings import DataConfig, DataSource

WIDTH = 80
_BINS, _BAR = 10, 30  # most bins of a histogram, and columns of its longest bar


def of_source(
    title: str, config: DataConfig, given: DataSource, format: str, first: Content, samples: Samples, template: str
) -> list[str]:
    """What is learned of a source, and how much that is.

    Args:
        format: of its records; empty for the user's own wording.
        first: what its first record says.
        template: which chat template its conversations have.
    """
    tokens, learned = int(samples.lengths.sum()), int(samples.learned.sum())
    rows = {
        "records": _format(given, format),
        "learned": _what(given, first),
        **(
            {"a sample is": _turns(given, samples), "chat template": template}
            if isinstance(first, Conversation)
            else {}
        ),
        "samples": f"{len(samples):,}",
        "tokens": f"{tokens:,}",
        "of them learned": f"{learned:,} ({100 * learned / tokens:.1f} %)",
        "lengths": _quantiles(samples.lengths),
        "data.max_length": str(config.max_length),
    }
    found = [title]
    for name, text in rows.items():
        found += wrapped(f"{name:<17}{text}", " " * 17)
    found += [f"  {line}" for line in histogram(samples.lengths)]
    report = samples.report.lines()
    if report and config.eval_share is not None:
        found += wrapped("of the records that are held out and those that are not:", "")
    for line in report:
        found += wrapped(line, "  ")
    return found


def wrapped(line: str, hanging: str) -> list[str]:
    """The line, indented, broken at blanks."""
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent="  ",
        subsequent_indent=f"  {hanging}",
        break_long_words=False,
        break_on_hyphens=False,
    )


def histogram(lengths: np.ndarray) -> list[str]:
    """A bar for each range of lengths.

    Args:
        lengths: ``[samples]``, tokens of each.
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = next(width for width in _widths() if high // width - low // width < _BINS)
    counts = np.bincount(lengths // width - low // width)
    digits, size = len(str(high // width * width + width - 1)), len(str(counts.max()))
    found = []
    for begin, count in zip(range(low // width * width, high + 1, width), counts.tolist(), strict=True):
        until = f" - {begin + width - 1:>{digits}}" if width > 1 else ""
        found.append(f"{begin:>{digits}}{until}  {count:>{size}}  {_bar(count / counts.max())}".rstrip())
    return found


def _widths() -> Iterator[int]:
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10


def _bar(share: float) -> str:
    return "█" * max(round(share * _BAR), int(share > 0))


def _quantiles(lengths: np.ndarray) -> str:
    named: Sequence[tuple[str, float]] = (("min", 0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("max", 1))
    return ", ".join(f"{name} {int(np.quantile(lengths, at, method='inverted_cdf'))}" for name, at in named)


def _format(given: DataSource, format: str) -> str:
    if not format:
        return "in your own wording (data.prompt_template)"
    return f"{format} (detected: data.format=auto)" if given.format == "auto" else f"{format} (data.format)"


def _what(given: DataSource, first: Content) -> str:
    if isinstance(first, Text):
        if all(is_learned for _, is_learned in first.pieces):
            return "the whole text, and its end"
        return "the response" + (", and its end" if first.pieces[-1][1] else "")
    return {"all": "every reply", "last": "the last reply"}[
        given.learn
    ] + f" of a conversation (data.learn={given.learn})"


def _turns(given: DataSource, samples: Samples) -> str:
    split = samples.report.counts[SPLIT]
    found = {
        "whole": "a whole conversation",
        "split": "one reply, with what came before it",
        "auto": f"a whole conversation; of {split}, in which the template drops a part of an earlier reply, one reply"
        if split
        else "a whole conversation: the template drops no part of an earlier reply",
    }
    return f"{found[given.turns]} (data.turns={given.turns})"
