"""Plots as SVG that takes its colours from the page: drawn by matplotlib in marker colours, which become CSS variables.

    text, axes -> currentColor        grid -> var(--line)        series -> var(--series-0), var(--series-1), ...

Text stays text, in the font of the page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure

from liftdist.report import read, weights
from liftdist.report.read import Curve, Run
from liftdist.report.weights import Factored, Weights
from liftdist.runs import results

NUM_SERIES = 8  # colours in template.html
_SERIES = [f"#5e{number:02x}ed" for number in range(NUM_SERIES)]
_GOOD, _BAD, _NEUTRAL = _SERIES[2], _SERIES[1], _SERIES[7]
_INK, _LINE = "#0a0b0c", "#1a1b1c"
_VARIABLES = {_INK: "currentColor", _LINE: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)
}
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _LINE, "xtick.color": _INK, "ytick.color": _INK,
    "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.frameon": False, "lines.linewidth": 1.3, "lines.markersize": 4,
}  # fmt: skip
_MOST_POINTS = 1000  # of a curve
_LONGEST = 28  # characters of a name in a legend
_numbers = itertools.count()


@dataclass
class Picture:
    """A figure of the page; ``svg`` is there once it is drawn."""

    title: str
    figure: Figure
    note: str = ""
    svg: Markup = field(default_factory=Markup)

    def pixels(self) -> np.ndarray:
        """``[height, width, 3]`` uint8, on white, in the colours of the light page. Not to be made SVG of again."""
        template = (Path(__file__).parent / "template.html").read_text(encoding="utf-8")
        colours = dict(zip(_SERIES, re.findall(r"--series-\d: (#\w+)", template), strict=False))
        colours |= {_INK: "black", _LINE: "lightgray"}
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()  # ticks are made when they are drawn
        for artist in self.figure.findobj():
            for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
                if hasattr(artist, f"get_{name}") and hasattr(artist, f"set_{name}"):
                    found = to_rgba_array(getattr(artist, f"get_{name}")())
                    if len(found) == 1 and found[0, 3] and to_hex(found[0]) in colours:
                        getattr(artist, f"set_{name}")(colours[to_hex(found[0])])
        self.figure.patch.set_facecolor("white")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def drawn(title: str, note: str = "", height: float = 2.7) -> Iterator[tuple[Picture, Axes]]:
    """Axes to draw on, of a figure of 4.6 inches by ``height``."""
    # of markers and clip paths, whose ids are then unique in the page
    style: Any = _STYLE | {"svg.hashsalt": f"figure {next(_numbers)}"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks: the browser has others
        figure = Figure(figsize=(4.6, height), layout="constrained")
        made = Picture(title, figure, note)
        yield made, figure.subplots()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    made.svg = Markup(svg.replace("<svg", label, 1))


def colour(number: int) -> str:
    return _SERIES[number % NUM_SERIES]


def short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


# ---------------------------------------------------------------------------------------------------------------------
# Curves of several runs.


def loss(runs: Sequence[Run], names: Sequence[str]) -> Picture | None:
    """Training loss, thin, and held-out loss, with marks; with one run also where it began again and what it skipped."""
    if not any(tag in run.curves for run in runs for tag in ("train/loss", "eval/loss")):
        return None
    with drawn("Loss") as (made, axes):
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            held_out = number if len(runs) > 1 else 1
            of_run = f"{short(name)}: " if len(runs) > 1 else ""
            if "train/loss" in run.curves:
                _plot(axes, run.curves["train/loss"], f"{of_run}training", colour(number), alpha=0.6, linewidth=1)
            if "eval/loss" in run.curves:
                _plot(axes, run.curves["eval/loss"], f"{of_run}held out", colour(held_out), marker="o")
        if len(runs) == 1:
            _mark_events(axes, runs[0])
        _finish(axes, "nats per token", log=_spans_decades(axes))
    return made


def metric(
    runs: Sequence[Run], names: Sequence[str], tag: str, title: str, unit: str, log: bool = False
) -> Picture | None:
    """One metric, a curve for each run that has it."""
    if not any(tag in run.curves for run in runs):
        return None
    with drawn(title) as (made, axes):
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            if tag in run.curves:
                _plot(axes, run.curves[tag], short(name) if len(runs) > 1 else None, colour(number))
        _finish(axes, unit, log=log and _spans_decades(axes))
    return made


def evaluation(title: str, of_runs: Mapping[int, Sequence[results.Figure]], names: Sequence[str]) -> Picture:
    """Scores of one task with their intervals.

    Args:
        of_runs: by the number of the run.
    """
    with drawn(title, "Bars: 95 % intervals. Dashed: the base model.") as (made, axes):
        steps = [one.step for found in of_runs.values() for one in found]
        apart = (max(steps) - min(steps)) / 100  # so that intervals of one step do not hide each other
        for number, found in of_runs.items():
            at = [one.step + apart * (number - (len(names) - 1) / 2) for one in found]
            name = short(names[number]) if len(names) > 1 else None
            axes.plot(at, [one.number for one in found], marker="o", color=colour(number), label=name)
            for place, one in zip(at, found, strict=True):
                if one.low is not None and one.high is not None:
                    axes.plot([place] * 2, [one.low, one.high], color=colour(number), linewidth=1)
            if found[0].step == 0 and len(found) > 1:
                axes.axhline(found[0].number, color=colour(number), linestyle="--", linewidth=1)
        _finish(axes, found[-1].metric)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# One run.


def timeline(run: Run) -> Picture | None:
    """Steps over time, attempts as spans in the colour of how they ended, checkpoints, and what failed."""
    if not run.attempts:
        return None
    first = run.attempts[0].begin
    longest = max(attempt.end for attempt in run.attempts) - first
    unit, seconds = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)

    def at(times: Any) -> Any:
        return (times - first) / seconds

    with drawn("Attempts, and steps over time") as (made, axes):
        shown: set[str] = set()
        for attempt in run.attempts:
            ended = {read.FINISHED: _GOOD, read.RUNNING: colour(0), "stopped": _NEUTRAL}.get(attempt.outcome, _BAD)
            label = None if attempt.outcome in shown else attempt.outcome
            shown.add(attempt.outcome)
            axes.axvspan(at(attempt.begin), at(attempt.end), color=ended, alpha=0.2, linewidth=0, label=label)
            axes.axvline(at(attempt.begin), color=ended, linewidth=1)
        for cause, ends in _causes(run).items():
            axes.vlines(at(ends), 0, 0.1, color=_BAD, transform=axes.get_xaxis_transform(), label=f"job ended: {cause}")
        steps = run.curves.get("train/loss")
        if steps is not None:
            axes.plot(at(steps.times), steps.steps, color=_INK, linewidth=1)
            saves = [save for attempt in run.attempts for save in attempt.saves]
            if saves:
                times, at_steps = zip(*saves, strict=True)
                axes.plot(at(np.array(times)), at_steps, "o", color=_INK, markersize=3, label="checkpoint")
            for found, name, marker in ((run.skipped, "skipped step", "x"), (run.failed_saves, "save failed", "v")):
                of = dict(zip(steps.steps.tolist(), steps.times.tolist(), strict=True))
                if known := [step for step in found if step in of]:
                    axes.plot([at(of[step]) for step in known], known, marker, color=_BAD, label=name)
        _finish(axes, "step", x=unit)
    return made


def _causes(run: Run) -> dict[str, np.ndarray]:
    """When jobs ended, by cause, for those that had one."""
    causes = dict.fromkeys(job["cause"] for job in run.jobs if job["cause"])
    return {short(cause): np.array([job["time"] for job in run.jobs if job["cause"] == cause]) for cause in causes}


def phases(run: Run) -> Picture | None:
    """Seconds of a step by phase, of the slowest rank each, stacked."""
    names = ("forward_backward", "exchange", "update", "refresh")
    whole = run.curves.get("time/step")
    if whole is None or not all(f"time/{name}" in run.curves for name in names):
        return None
    parts = [run.curves[f"time/{name}"].values for name in names]
    if any(part.shape != whole.values.shape for part in parts):  # of another version
        return None
    rest = np.maximum(whole.values - sum(parts), 0)
    every = max(1, -(-len(whole.steps) // _MOST_POINTS))
    with drawn("Time by phase", "Of the slowest rank in each phase.") as (made, axes):
        axes.stackplot(
            whole.steps[::every],
            [np.nan_to_num(part[::every]) for part in (*parts, rest)],
            labels=[*(name.replace("_", ", ") for name in names), "rest"],
            colors=[*_SERIES[:4], _NEUTRAL],
            linewidth=0,
        )
        _finish(axes, "seconds a step", above=True)
    return made


def memory(run: Run) -> Picture | None:
    """Peak memory of every rank."""
    if not run.memory:
        return None
    where = "devices" if run.of_ranks("memory_gib/device_peak") else "hosts"
    note = f"{len(run.memory)} ranks" if len(run.memory) > NUM_SERIES else ""
    with drawn(f"Peak memory of the {where}, by rank", note) as (made, axes):
        for number, (rank, curve) in enumerate(run.memory.items()):
            label = f"rank {rank}" if not note else None
            _plot(axes, curve, label, colour(number), linewidth=0.7 if note else 1.3)
        axes.set_ylim(bottom=0)
        _finish(axes, "GiB")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Weights.


def of_weights(found: Weights, filter_rank: int | None) -> list[Picture]:
    """All that there is to draw of a run's weights."""
    spread = "In the densest tenth of them; 10 % if spread evenly."
    squared = "Squared norm over the largest squared singular value."
    pictures = [
        heat("Principal weights", found.share, "Share of a matrix's weights.", low=0),
        heat("Principal weights by rows", found.rows, spread),
        heat("Principal weights by columns", found.columns, spread),
        heat(f"Kept since step {found.since}", found.survived, "Share of the principal weights of then."),
        heat("Overlap with magnitude", found.magnitude, "Share that is among as many of the largest weights."),
        heat("Size of the update", found.update, "Its norm, of that of the base model's matrix."),
        heat("Stable rank of the update", found.stable_rank, squared, False),
        spectra(found.factored, filter_rank if found.selected else None),
        captured(found.factored),
    ]
    return [picture for picture in pictures if picture is not None]


def heat(
    title: str, values: Mapping[str, float], note: str, percent: bool = True, low: float | None = None
) -> Picture | None:
    """A figure of each matrix, by layer and kind; the mean of those that share a place, as experts do.

    Args:
        low: what the darkest colour stands for; the least of ``values`` if there is none.
    """
    places: dict[tuple[int, str], list[float]] = {}
    for name, value in values.items():
        if (layer := weights.layer_of(name)) is not None:
            places.setdefault((layer, weights.kind_of(name)), []).append(value)
    if not places:
        return None
    layers, kinds = max(layer for layer, _ in places) + 1, list(dict.fromkeys(kind for _, kind in sorted(places)))
    grid = np.full((layers, len(kinds)), np.nan)
    for (layer, kind), found in places.items():
        grid[layer, kinds.index(kind)] = np.mean(found)
    ends = [kind.rpartition(".")[2] for kind in kinds]
    labels = ends if len(set(ends)) == len(ends) else kinds
    with drawn(title, note, height=min(2.2 + 0.07 * layers, 6)) as (made, axes):
        cells = axes.pcolormesh(
            np.arange(len(kinds)),
            np.arange(layers),
            grid,
            shading="nearest",
            cmap="viridis",
            vmin=low,
            edgecolors="face",
        )
        axes.set_xticks(np.arange(len(kinds)), [short(label) for label in labels], rotation=35, ha="right")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.invert_yaxis()
        axes.set_ylabel("layer")
        axes.grid(False)
        bar = axes.figure.colorbar(cells, ax=axes, format=ticker.PercentFormatter(1) if percent else None)
        bar.outline.set_linewidth(0)
    return made


def spectra(found: Sequence[Factored], filter_rank: int | None) -> Picture | None:
    """Singular values of a few matrices, whole lines, and of their updates, dashed."""
    if not found:
        return None
    with drawn("Singular values", "Whole: of the base model's matrix. Dashed: of the update.", height=3.2) as (
        made,
        axes,
    ):
        for number, one in enumerate(found):
            ranks = np.arange(1, len(one.base) + 1)
            axes.plot(ranks, one.base, color=colour(number), label=_named(one.name))
            positive = one.update > 1e-6 * one.update[0]  # the others are rounding
            axes.plot(ranks[positive], one.update[positive], "--", color=colour(number))
        if filter_rank:
            axes.axvline(filter_rank, color=_INK, linestyle=":", linewidth=1, label=f"filter rank {filter_rank}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        _finish(axes, "singular value", x="number, descending")
    return made


def captured(found: Sequence[Factored]) -> Picture | None:
    """How much of the update is in the leading singular directions of the base."""
    if not found:
        return None
    note = (
        "Of its squared norm, in the span of the r leading left and right singular vectors. Dotted: of a random update."
    )
    with drawn("Update in the base's leading directions", note, height=3.2) as (made, axes):
        for number, one in enumerate(found):
            ranks = np.arange(1, len(one.captured) + 1)
            axes.plot(ranks / len(ranks), one.captured, color=colour(number), label=_named(one.name))
            axes.plot(ranks / len(ranks), ranks**2 / math.prod(one.shape), ":", color=colour(number), linewidth=0.8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.PercentFormatter(1))
        _finish(axes, "part of the update", x="r, of all singular vectors")
    return made


def _named(name: str) -> str:
    return short(f"{weights.layer_of(name)}: {weights.kind_of(name).rpartition('.')[2]}")


# ---------------------------------------------------------------------------------------------------------------------
# What they have in common.


def _plot(axes: Axes, curve: Curve, label: str | None, colour: str, **style: object) -> None:
    chosen = _thinned(curve.values)
    axes.plot(curve.steps[chosen], curve.values[chosen], label=label, color=colour, **style)  # type: ignore[arg-type]


def _thinned(values: np.ndarray) -> np.ndarray:
    """Indices of at most ``_MOST_POINTS`` entries: the least and the greatest of each stretch, so that no peak is lost."""
    if len(values) <= _MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), _MOST_POINTS // 2)
    low, high = np.nan_to_num(values, nan=np.inf), np.nan_to_num(values, nan=-np.inf)
    return np.unique(
        [stretch[pick] for stretch in stretches for pick in (low[stretch].argmin(), high[stretch].argmax())]
    )


def _mark_events(axes: Axes, run: Run) -> None:
    """Where attempts after the first began, skipped steps, and saves that failed."""
    losses = run.curves.get("train/loss")
    if losses is None:
        return
    for attempt in run.attempts[1:]:
        later = losses.steps[losses.times >= attempt.begin]
        if later.size:
            axes.axvline(int(later[0]) - 0.5, color=_BAD, linestyle=":", linewidth=1, label=f"attempt {attempt.number}")
    for found, name, marker in ((run.skipped, "skipped step", "x"), (run.failed_saves, "save failed", "v")):
        if found:
            bottom = axes.get_xaxis_transform()
            axes.plot(found, [0.03] * len(found), marker, color=_BAD, transform=bottom, label=name)


def _spans_decades(axes: Axes) -> bool:
    values = [
        np.asarray(line.get_ydata(), float) for line in axes.get_lines() if line.get_transform() == axes.transData
    ]
    found = np.concatenate(values) if values else np.empty(0)
    found = found[np.isfinite(found)]
    return bool(found.size) and found.min() > 0 and found.max() > 10 * found.min()


def _finish(axes: Axes, unit: str, x: str = "step", log: bool = False, above: bool = False) -> None:
    """Label the axes.

    Args:
        above: whether the legend stands above them, where they are full.
    """
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(unit)
    if x == "step":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=6))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(**dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=3) if above else {})
