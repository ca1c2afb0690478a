"""Runs side by side: ends, losses, speed, memory and scores, the best of each row marked, and how sure that is."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from liftdist.evaluation import statistics
from liftdist.report.read import Run, names
from liftdist.runs.results import CHANGE, Figure
from liftdist.training.best import less_is_better
from liftdist.training.marked import visible

LEVEL = 0.05  # of significance


@dataclass(frozen=True)
class Row:
    """One thing that is compared.

    Args:
        cells: a text for each run, empty where it is not known.
        best: the runs with the best value, if there is one to be had.
        note: what the best one's lead is worth.
    """

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    note: str = ""


def rows(runs: Sequence[Run]) -> list[Row]:
    """What is known of any of the runs."""
    found = [
        Row("state", [run.attempts[-1].outcome if run.attempts else run.state for run in runs]),
        Row("method", [_method(run) for run in runs]),
        Row("steps", [str(run.step) for run in runs]),
        Row("attempts", [str(len(run.attempts)) for run in runs]),
        Row("duration", [duration(run.seconds) for run in runs]),
        _numbers("training loss, last tenth", [_end(run, "train/loss") for run in runs], min),
        _numbers("held-out loss, last", [_of(run, "eval/loss", lambda v: v[-1]) for run in runs], min),
        _numbers("held-out loss, least", [_of(run, "eval/loss", np.min) for run in runs], min),
        _numbers(
            "tokens/s, median", [_of(run, "throughput/tokens_per_second", np.median) for run in runs], max, "{:.0f}"
        ),
        _numbers("peak memory of a rank, GiB", [_memory(run) for run in runs], min, "{:.2f}"),
        *_scores(runs),
    ]
    return [row for row in found if any(row.cells)]


def lines(runs: Sequence[Run]) -> list[str]:
    """The rows as a table of text; ``*`` marks the best of each."""
    found = [Row("", names(runs)), *rows(runs)]
    columns = [[visible(row.name) for row in found]]
    for number in range(len(runs)):
        columns.append([visible(row.cells[number]) + " *" * (number in row.best) for row in found])
    for column in columns:
        width = max(map(_width, column))
        column[:] = [cell + " " * (width - _width(cell)) for cell in column]
    columns.append([visible(row.note) for row in found])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _method(run: Run) -> str:
    if not run.settings:
        return ""
    criterion = run.settings.get("selection.criterion", "low_rank")
    return f"{run.method}, {criterion}" if run.method == "lift" and criterion != "low_rank" else run.method


def _numbers(name: str, values: Sequence[float], pick: Callable, form: str = "{:.4f}") -> Row:
    """A row of numbers, NaN where there is none. Equal ones, as they are shown, are all best."""
    cells = ["" if math.isnan(value) else form.format(value) for value in values]
    known = [value for value in values if not math.isnan(value)]
    best = form.format(pick(known)) if len(known) > 1 else None
    return Row(name, cells, frozenset(number for number, cell in enumerate(cells) if cell and cell == best))


def _of(run: Run, tag: str, reduce: Callable[[np.ndarray], float]) -> float:
    values = run.curves[tag].values if tag in run.curves else np.empty(0)
    values = values[np.isfinite(values)]
    return float(reduce(values)) if values.size else math.nan


def _end(run: Run, tag: str) -> float:
    """The mean over the last tenth of the entries."""
    return _of(run, tag, lambda values: values[-max(1, len(values) // 10) :].mean())


def _memory(run: Run) -> float:
    return max((float(np.nanmax(curve.values)) for curve in run.memory.values()), default=math.nan)


def _scores(runs: Sequence[Run]) -> Iterator[Row]:
    for task, metric in dict.fromkeys(key for run in runs for key in run.evaluations):
        last = [run.evaluations[task, metric][-1] if (task, metric) in run.evaluations else None for run in runs]
        pick = min if less_is_better(metric) else max
        row = _numbers("", [math.nan if one is None else one.number for one in last], pick)
        cells = ["" if one is None else interval(one.number, one.low, one.high) for one in last]
        note = _since_base(runs, last) if metric.endswith(CHANGE) else _significance(runs, task, row.best)
        yield Row(f"{task}, {metric.replace('_', ' ')}", cells, row.best, note)


def _since_base(runs: Sequence[Run], changes: Sequence[Figure | None]) -> str:
    """How sure it is that each run differs from its base model."""
    return "; ".join(
        f"{name} {_sure(one.p)}" for name, one in zip(names(runs), changes, strict=True) if one and one.p is not None
    )


def _sure(p: float) -> str:
    return f"{'significant' if p < LEVEL else 'not significant'}, p = {p:.2g}"


def interval(value: float, low: float | None, high: float | None) -> str:
    """A score with its 95 % interval, where that is known."""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _significance(runs: Sequence[Run], task: str, best: frozenset[int]) -> str:
    """How the best run compares with each other one, by the questions that both have answered at their last evaluation."""
    if not best:
        return ""
    called, first = names(runs), min(best)
    answers = [run.answers[task][max(run.answers[task])] if run.answers.get(task) else {} for run in runs]
    found = []
    for number in range(len(runs)):
        shared = set(answers[first]) & set(answers[number])
        both = sorted(id for id in shared if answers[first][id].question == answers[number][id].question)
        if number != first and both:
            mine, theirs = ([answers[run][id].score for id in both] for run in (first, number))
            sure = _sure(statistics.paired(theirs, mine))
            found.append(f"against {called[number]} {sure} ({len(both)} questions)")
    return "; ".join(found)


def _width(text: str) -> int:
    """Columns on a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )
