"""A run directory, read into one :class:`Run`: all that is shown of it besides its weights. Imports no torch.

    config.yaml, environment.json, command.txt     settings, versions, what was typed
    metrics.jsonl                                  curves by tag
    attempts/, jobs.jsonl                          starts, ends and their causes
    eval.jsonl, eval/TASK/step-00000100.jsonl      evaluations, and their answers by question

What is absent, cut short, or of another version is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from liftdist import files, schema_tree
from liftdist.cluster import history
from liftdist.errors import UserError
from liftdist.redaction import redact
from liftdist.runs import claims, layout, results
from liftdist.runs.results import Answer, Figure
from liftdist.schema import Config

RUNNING, FINISHED, VANISHED = "running", "finished", "vanished"  # outcomes; others are "stopped" and "failed"


@dataclass(frozen=True)
class Curve:
    """A metric. Three arrays ``[entries]``, by ascending step; values that were not finite are NaN."""

    steps: np.ndarray
    times: np.ndarray  # seconds since the epoch
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Attempt:
    """One start of the run. Times are in seconds since the epoch."""

    number: int
    begin: float
    end: float  # by its last heartbeat, if it goes on or vanished
    outcome: str
    reason: str
    saves: list[tuple[float, int]]  # time and step of each checkpoint

    @property
    def said(self) -> str:
        """How it ended, or that it goes on."""
        said = {
            RUNNING: "still running",
            VANISHED: "ended without a word: it was killed, or its machine went down",
        }.get(self.outcome, self.outcome)
        return f"{said}: {self.reason}" if self.reason else said


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]  # by dotted key; empty if the run did not get that far
    facts: dict[str, Any]  # of environment.json
    commands: list[str]
    attempts: list[Attempt]
    jobs: list[history.Event]  # ends of jobs
    curves: dict[str, Curve] = field(repr=False)
    evaluations: dict[tuple[str, str], list[Figure]]  # by task and metric, by ascending step; values are finite
    answers: dict[str, dict[int, dict[int, Answer]]] = field(repr=False)  # by task, step and question

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        default = {key: schema_tree.default_of(leaf) for key, leaf in schema_tree.settings(Config)}
        return {
            key: value
            for key, value in self.settings.items()
            if default.get(re.sub(r"\.\d+\.", ".N.", key), []) != value  # entries of a list, which is empty by default
        }

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "lift"))

    @property
    def data(self) -> str:
        return ", ".join(str(value) for key, value in self.settings.items() if is_data(key) and value)

    @property
    def ranks(self) -> int | None:
        mesh = self.facts.get("mesh")
        sizes = list(mesh.values()) if isinstance(mesh, dict) else []
        return math.prod(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None

    @property
    def seconds(self) -> float:
        """In which ranks were there, over all attempts."""
        return sum(attempt.end - attempt.begin for attempt in self.attempts)

    @property
    def step(self) -> int:
        """The last that has metrics."""
        return max((int(curve.steps[-1]) for tag, curve in self.curves.items() if tag == "train/loss"), default=0)

    @property
    def state(self) -> str:
        """How the run ended, or that it goes on, in one line."""
        return f"{self.attempts[-1].said}, after step {self.step}" if self.attempts else "has not begun"

    @property
    def skipped(self) -> list[int]:
        """Steps that were skipped because loss or gradient was not finite; between two entries, the later one."""
        counts = self.curves.get("train/skipped_steps")
        if counts is None:
            return []
        return counts.steps[np.diff(counts.values, prepend=0) > 0].tolist()

    @property
    def failed_saves(self) -> list[int]:
        return self.curves["checkpoint/failed"].steps.tolist() if "checkpoint/failed" in self.curves else []

    def of_ranks(self, tag: str) -> dict[int, Curve]:
        """The curves ``TAG/rankN``, by rank."""
        found = {re.fullmatch(rf"{re.escape(tag)}/rank(\d+)", name): curve for name, curve in self.curves.items()}
        return {int(match[1]): curve for match, curve in sorted(found.items(), key=_rank) if match}

    @property
    def memory(self) -> dict[int, Curve]:
        """Peak memory of every rank in GiB: of its device, or of the host where it has none."""
        return self.of_ranks("memory_gib/device_peak") or self.of_ranks("memory_gib/host_peak")


def is_data(key: str) -> bool:
    """Whether a setting, by its dotted key, says where training data are."""
    return re.fullmatch(r"data\.(sources\.\d+\.)?path", key) is not None


def _rank(item: tuple[re.Match[str] | None, Curve]) -> int:
    return int(item[0][1]) if item[0] else -1


def read(folder: Path) -> Run:
    """What a run directory holds. Raises ``UserError``: it is none, or a file in it cannot be read."""
    layout.check_run(folder)
    try:
        return Run(
            folder,
            dict(schema_tree.leaves(_tree(yaml.safe_load(_text(folder / "config.yaml")), "config.yaml"))),
            _tree(json.loads(_text(folder / "environment.json") or "{}"), "environment.json"),
            [redact(line) for line in _text(folder / "command.txt").splitlines()],
            _attempts(folder),
            [event for event in history.read(folder) if event["event"] == "end"],
            _curves(folder / layout.METRICS),
            _evaluations(folder),
            _answers(folder),
        )
    except OSError as error:
        raise UserError(files.reason(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged: {str(error).splitlines()[0]}") from None


def read_all(folders: Sequence[Path]) -> list[Run]:
    """The runs, each once. Raises ``UserError`` as :func:`read`, and for a run that is given twice."""
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder}: is given twice")
        seen.add(folder.resolve())
    return [read(folder) for folder in folders]


def names(runs: Sequence[Run]) -> list[str]:
    """What to call each: its folder's name, or the path that was given where two have one name."""
    alike = len({run.name for run in runs}) < len(runs)
    return [str(run.folder) if alike else run.name for run in runs]


def _text(path: Path) -> str:
    """The text of a file, empty if there is none; what is no text in it, such as half a character at its end, is replaced."""
    try:
        with files.open_to_read(path) as file:
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _tree(tree: Any, name: str) -> dict[str, Any]:
    if not isinstance(tree or {}, dict):
        raise ValueError(f"{name} holds no mapping")
    return tree or {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines. Others are skipped: the last line may be cut, or still being written."""
    for line in _text(path).split("\n"):  # a text may hold other ends of lines
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _attempts(folder: Path) -> list[Attempt]:
    """All attempts. One that the next has followed is over, whatever a copy of its file says of its heartbeat."""
    found = [_attempt(folder, number, events) for number, events in claims.attempts(folder).items()]
    for number, later in enumerate(found[1:]):
        ended = VANISHED if found[number].outcome == RUNNING else found[number].outcome
        found[number] = dataclasses.replace(found[number], end=min(found[number].end, later.begin), outcome=ended)
    return found


def _attempt(folder: Path, number: int, events: Sequence[claims.Event]) -> Attempt:
    path = claims.path_of(folder, number)
    kept = [event for event in events if isinstance(event, dict)]
    last = [event for event in kept if event.get("event") == "end"]
    saves = [(float(e["time"]), int(e["step"])) for e in kept if e.get("event") == "commit" and _has(e, "time", "step")]
    beat = path.stat().st_mtime
    begin = float(kept[0]["time"]) if _has(kept[0], "time") else beat
    if not last:
        outcome = VANISHED if claims.is_over(path, kept, time.time()) else RUNNING
        return Attempt(number, begin, beat, outcome, "", saves)
    end = float(last[-1]["time"]) if _has(last[-1], "time") else beat
    return Attempt(number, begin, end, str(last[-1].get("outcome")), str(last[-1].get("reason", "")), saves)


def _has(record: dict[str, Any], *keys: str) -> bool:
    """Whether the values of ``keys`` are numbers, and finite."""
    return all(isinstance(record.get(key), int | float) and math.isfinite(record[key]) for key in keys)


def _curves(path: Path) -> dict[str, Curve]:
    found: dict[str, tuple[list[int], list[float], list[float]]] = {}
    for record in _records(path):
        if not _has(record, "step"):
            continue
        step, when = int(record["step"]), record["time"] if _has(record, "time") else math.nan
        for tag, value in record.items():
            if tag not in ("step", "time") and (value is None or isinstance(value, int | float)):
                steps, times, values = found.setdefault(tag, ([], [], []))
                steps.append(step)
                times.append(when)
                values.append(float(record[tag]) if _has(record, tag) else math.nan)
    return {tag: _curve(*(np.array(column) for column in columns)) for tag, columns in found.items()}


def _curve(steps: np.ndarray, times: np.ndarray, values: np.ndarray) -> Curve:
    """By ascending step; of several entries of one step the last."""
    order = np.argsort(steps, kind="stable")
    last = order[np.append(np.diff(steps[order]) > 0, True)]
    return Curve(steps[last], times[last], values[last])


def _evaluations(folder: Path) -> dict[tuple[str, str], list[Figure]]:
    found: dict[tuple[str, str], list[Figure]] = {}
    for figure in results.read(folder):
        if math.isfinite(figure.number):
            found.setdefault((figure.task, figure.metric), []).append(figure)
    return found


def _answers(folder: Path) -> dict[str, dict[int, dict[int, Answer]]]:
    return {
        task: {
            step: {answer.id: answer for answer in results.read_answers(folder, task, step)}
            for step in results.steps(folder, task)
        }
        for task in results.tasks(folder)
    }
