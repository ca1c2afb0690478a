"""The page: one file that opens without network, light or dark, on a screen of any width."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from liftdist import __version__
from liftdist.evaluation import statistics
from liftdist.report import compare, figures, weights
from liftdist.report.figures import Picture
from liftdist.report.read import Run, names
from liftdist.runs.results import CHANGE, Answer, Figure
from liftdist.training.marked import visible

_EXAMPLES = 8  # answers that are shown of those that became right, and of those that became wrong
_CURVES = (  # metric, title, unit, whether a logarithmic axis helps
    ("train/lr", "Learning rate", "", False),
    ("train/grad_norm", "Gradient norm, before clipping", "", True),
    ("throughput/tokens_per_second", "Throughput", "tokens/s", False),
    ("eval/kl_to_base", "Divergence from the base model", "nats per token", False),
    ("selection/survived", "Weights that survive a refresh", "share", False),
)


@dataclass(frozen=True)
class Changed:
    """How the answer to one question differs between two evaluations."""

    before: Answer
    after: Answer


@dataclass(frozen=True)
class Examples:
    """Questions of one task whose answers became better or worse between two evaluations, those that changed most first."""

    task: str
    first: int  # steps
    last: int
    better: list[Changed]
    worse: list[Changed]
    questions: int  # that both have answered
    p: float  # of a difference at least as large, were there none


def render(runs: Sequence[Run], base: Path | None = None, seconds: float = 0) -> str:
    """The page of one or several runs.

    Args:
        base: folder of their base model, if it is not where the runs found it.
        seconds: for the weights of each run, see :mod:`liftdist.report.weights`; 0 leaves them out.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "duration": compare.duration, "when": _when}
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    called = names(runs)
    return template.render(
        title=f"liftdist report: {', '.join(called)}",
        called=called,
        runs=runs,
        rows=compare.rows(runs) if len(runs) > 1 else [],
        curves=_curves(runs, called),
        scores=_scores(runs, called),
        evaluated=[list(_evaluated(run)) for run in runs],
        sections=[_section(run, base, seconds) for run in runs],
        examples=examples,
        interval=compare.interval,
        made=time.time(),
        version=__version__,
        most=_EXAMPLES,
        examined=weights.EXAMINED,
        cosine=weights.COSINE,
    )


def _curves(runs: Sequence[Run], called: Sequence[str]) -> list[Picture]:
    found = [figures.loss(runs, called), *(figures.metric(runs, called, *each) for each in _CURVES)]
    return [picture for picture in found if picture is not None]


def _scores(runs: Sequence[Run], called: Sequence[str]) -> list[Picture]:
    keys = dict.fromkeys(key for run in runs for key in run.evaluations if not key[1].endswith(CHANGE))
    return [
        figures.evaluation(
            f"{key[0]}, {key[1]}",
            {number: run.evaluations[key] for number, run in enumerate(runs) if key in run.evaluations},
            called,
        )
        for key in keys
    ]


def _evaluated(run: Run) -> Iterator[tuple[Figure | None, Figure, Figure | None]]:
    """Of each score the base model's, the last, and the change between them, as far as they are known."""
    for (task, metric), found in run.evaluations.items():
        if not metric.endswith(CHANGE):
            changes = [one for one in run.evaluations.get((task, metric + CHANGE), []) if one.step == found[-1].step]
            yield found[0] if found[0].step == 0 else None, found[-1], changes[0] if changes else None


def _section(run: Run, base: Path | None, seconds: float) -> dict[str, Any]:
    """What is shown of one run alone."""
    pictures = [figures.timeline(run), figures.phases(run), figures.memory(run)]
    return {
        "facts": dict(_facts(run)),
        "pictures": [picture for picture in pictures if picture is not None],
        "weights": _weights(run, base, seconds) if seconds else None,
    }


def _weights(run: Run, base: Path | None, seconds: float) -> dict[str, Any]:
    found = weights.of(run, base, seconds)
    return {"found": found, "pictures": figures.of_weights(found, run.settings.get("selection.filter_rank"))}


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """What ran on what; only what is known."""
    packages = run.facts.get("packages")
    versions = {"liftdist": run.facts.get("liftdist"), "git": run.facts.get("git"), "python": run.facts.get("python")}
    versions |= packages if isinstance(packages, dict) else {}
    mesh = run.facts.get("mesh")
    yield "state", run.state
    yield "model", str(run.settings.get("model.path", ""))
    yield "data", run.data
    yield "method", run.method if run.settings else ""
    yield "device", " on ".join(str(run.facts[key]) for key in ("device", "host") if key in run.facts)
    yield "ranks", f"{run.ranks}: {', '.join(f'{k} {v}' for k, v in mesh.items())}" if run.ranks and mesh else ""
    yield "start", _when(run.attempts[0].begin) if run.attempts else ""
    yield "duration", f"{compare.duration(run.seconds)}, in {len(run.attempts)} attempt{'s' * (len(run.attempts) != 1)}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "folder", str(run.folder.resolve())


def examples(run: Run) -> Iterator[Examples]:
    """Of each task that was evaluated more than once, what differs between its first and its last evaluation."""
    for task, of_step in run.answers.items():
        first, last = min(of_step), max(of_step)
        both = [
            Changed(of_step[first][id], now)
            for id, now in of_step[last].items()
            if id in of_step[first] and of_step[first][id].question == now.question
        ]
        both.sort(key=lambda pair: -abs(pair.after.score - pair.before.score))
        better = [pair for pair in both if pair.after.score > pair.before.score]
        worse = [pair for pair in both if pair.after.score < pair.before.score]
        if both and first != last:
            p = statistics.paired([pair.before.score for pair in both], [pair.after.score for pair in both])
            yield Examples(task, first, last, better, worse, len(both), p)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
