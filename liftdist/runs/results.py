"""What evaluations on tasks found, in the run directory.

    eval.jsonl                       one figure a line: {"step", "task", "metric", "value", "low", "high", "questions", "p"}
    eval/TASK/step-00000100.jsonl    one question a line: {"id", "prompt", "answer", "expected", "extracted", "score", "tokens",
                                     "how", "timed_out"}
    eval/base.json                   {"sha256"}: digest of the base model that they are of

``low`` and ``high`` bound the interval of confidence, ``questions`` is what it rests on, ``expected`` a list. ``p`` is that of a
metric ``METRIC_change``, the difference to the base model; ``tokens`` those of a reply whose perplexity is measured. A value that
is not finite is null. A file of questions appears whole. Lines that are cut short, or of another version, are not read.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

from liftdist import files
from liftdist.errors import UserError
from liftdist.runs import lines
from liftdist.runs.layout import TENSORBOARD

NAME, FOLDER, CHANGE = "eval.jsonl", "eval", "_change"
_ANY = f"step-{'[0-9]' * 8}.jsonl"
Kind = TypeVar("Kind", "Figure", "Answer")
Number = int | float


@dataclass(frozen=True)
class Figure:
    step: int
    task: str
    metric: str
    value: Number | None
    low: Number | None = None
    high: Number | None = None
    questions: int | None = None
    p: Number | None = None  # of a change at least as large, were there none

    @property
    def number(self) -> float:
        """The value, NaN where it was not finite."""
        return math.nan if self.value is None else self.value


@dataclass(frozen=True)
class Answer:
    id: int  # of the question
    prompt: str
    answer: str
    expected: list[str]
    extracted: str | None
    score: Number  # 0 to 1; of a task that measures perplexity the log-likelihood of the reply, in nats
    tokens: int | None = None  # of that reply
    how: str = ""  # digest of the settings by which it was made and scored
    timed_out: bool = False  # it is taken for wrong because to compare it took too long

    @property
    def question(self) -> tuple[object, ...]:
        """What two answers have in common that can be compared."""
        return self.id, self.prompt, tuple(self.expected), self.tokens, self.how


class Results:
    """Writes results. By one process alone.

    Args:
        after: the step from which the run continues: what was found later is removed; None keeps all.

    Raises:
        UserError: a link in place of one of the folders.
    """

    def __init__(self, run_dir: Path, after: int | None = None) -> None:
        self._run_dir = run_dir
        if after is not None:
            _remove_answers(run_dir, after)
        self._file = lines.open_after(run_dir / NAME, after)

    def add(self, figure: Figure, answers: Sequence[Answer] = ()) -> None:
        """Write a figure, after the answers that it sums up, if there are any. Raises ``OSError``, ``UserError`` for a link."""
        if answers:
            folder = files.real_folder(files.real_folder(self._run_dir / FOLDER) / figure.task)
            text = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
            files.write(folder / _name(figure.step), text)
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(figure).items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def check_base(run_dir: Path, sha256: str) -> None:
    """Keep of which base model the results are, see :meth:`ModelConfig.identity`. Raises ``UserError`` if there are some of
    another.
    """
    path = files.real_folder(run_dir / FOLDER) / "base.json"
    is_kept = bool(read(run_dir)) or any(path.parent.glob("*/*"))
    if path.exists() and is_kept and json.loads(files.read(path))["sha256"] != sha256:
        raise UserError(
            f"{path.parent}: holds answers of another model than model.path, or of another model.base_dtype; give another "
            f"run_dir, or remove {NAME} and {FOLDER} from this one"
        )
    files.write(path, json.dumps({"sha256": sha256}))


def are_alone(run_dir: Path) -> bool:
    """Whether a folder holds nothing but what a model has answered before a run begins there."""
    names = {path.name for path in run_dir.iterdir()}
    return FOLDER in names and names <= {NAME, FOLDER, TENSORBOARD}


def read(run_dir: Path) -> list[Figure]:
    """The figures of a run by step, the newest of each step, task and metric. Raises ``UserError`` if the file cannot be read."""
    path = run_dir / NAME
    found = {(one.step, one.task, one.metric): one for one in (_parsed(Figure, path) if path.exists() else ())}
    return sorted(found.values(), key=lambda figure: figure.step)


def read_answers(run_dir: Path, task: str, step: int) -> list[Answer]:
    """The answers to the questions of a task after a step. Raises ``UserError`` if there are none."""
    return list(_parsed(Answer, run_dir / FOLDER / task / _name(step)))


def tasks(run_dir: Path) -> list[str]:
    """The tasks to whose questions there are answers."""
    return sorted({path.parent.name for path in (run_dir / FOLDER).glob(f"*/{_ANY}")})


def steps(run_dir: Path, task: str) -> list[int]:
    """The steps after which there are answers to a task's questions."""
    return sorted(_step(path) for path in (run_dir / FOLDER / task).glob(_ANY))


def _remove_answers(run_dir: Path, after: int) -> None:
    for folder in (run_dir / FOLDER, *(run_dir / FOLDER).glob("*/")):
        files.check_real_folder(folder)
        for path in folder.glob(_ANY):
            if _step(path) > after:
                path.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}.jsonl"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _parsed(kind: type[Kind], path: Path) -> Iterator[Kind]:
    """The lines of a file that are of a kind."""
    try:
        with files.open_to_read(path) as file:
            text = file.read().decode(errors="replace")
    except OSError as error:
        raise UserError(files.reason(error)) from None
    types = {name: list if hint == list[str] else hint for name, hint in get_type_hints(kind).items()}
    for line in text.split("\n")[:-1]:  # a text may hold other ends of lines
        with contextlib.suppress(ValueError, TypeError):
            record = json.loads(line)
            made = kind(**{name: record[name] for name in types if name in record})
            if all(isinstance(getattr(made, name), type) for name, type in types.items()):
                yield made
