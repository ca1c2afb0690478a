"""Deltas as candidates: what tasks say of the models that they make.

score    mean over tasks of their accuracy; or of their perplexity, negative

Each candidate is written as a model folder, asked by ``liftdist eval`` in processes of its own, and removed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from liftdist import config as configs
from liftdist import files
from liftdist.deltas.delta import Delta
from liftdist.deltas.formats import hf
from liftdist.errors import UserError
from liftdist.evaluation_settings import OWN_TEXT, PERPLEXITY
from liftdist.runs import layout, results
from liftdist.schema import Config

Ask = Callable[[Delta | None], float]  # the score of the base model with a delta applied, or as it is
HEADING = f"{'score':>10}  candidate"


def scored(ask: Ask, candidate: Delta | None, title: str, say: Callable[[str], None]) -> float:
    """The score of a candidate, whose line of a table below :data:`HEADING` is said."""
    score = ask(candidate)
    say(f"{score:>10.4f}  {title}")
    return score


def settings(path: Path) -> tuple[Path, Config]:
    """A config file, or that of a run directory, and its settings. Raises ``UserError`` if its tasks have no common score."""
    if path.is_dir():
        layout.check_run(path)
        path = path / "config.yaml"
    config, _ = configs.load(path)
    kinds = {task.kind for task in config.eval.tasks}
    if not kinds:
        raise UserError(f"{path}: eval.tasks: say what candidates are to be asked, such as eval.tasks=[gsm8k]")
    if OWN_TEXT in kinds or (PERPLEXITY in kinds and len(kinds) > 1):
        raise UserError(
            f"{path}: eval.tasks: have no score in common; list tasks of accuracy, or of kind={PERPLEXITY}, alone"
        )
    for key, is_set in (("eval.server", config.eval.server), ("model.base_dtype", config.model.base_dtype)):
        if is_set is not None:
            raise UserError(f"{path}: {key}: would not ask the candidates as they are; leave it out")
    return path, config


def by_eval(path: Path, config: Config, base: Path, target: Path) -> Ask:
    """What asks the tasks of a config file by ``liftdist eval``; beside ``target`` must be room for a model folder."""

    def ask(candidate: Delta | None) -> float:
        with files.scratch_beside(target) as scratch:
            folder, run_dir = base, scratch / "run"
            if candidate is not None:
                hf.write(candidate, base, folder := scratch / "model")
            _eval(path, config, folder, run_dir)
            values = [figure.number for figure in results.read(run_dir) if not figure.metric.endswith(results.CHANGE)]
        assert len(values) == len(config.eval.tasks)
        is_perplexity = config.eval.tasks[0].kind == PERPLEXITY
        return sum(values) / len(values) * (-1 if is_perplexity else 1)

    return ask


def _eval(path: Path, config: Config, folder: Path, run_dir: Path) -> None:
    words = [str(path), f"model.path={folder.absolute()}", f"run_dir={run_dir.absolute()}"]
    words += ["model.revision="] if config.model.revision is not None else []
    with subprocess.Popen(
        [sys.executable, "-m", "liftdist", "eval", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()  # until its ranks, too, write no more to the folder that is about to be removed
            raise
    if process.returncode:
        said = [line for line in output.splitlines() if line.startswith("liftdist: ")]
        if not said:
            sys.stderr.write(output)
        reason = said[-1].removeprefix("liftdist: ") if said else f"ended with code {process.returncode}"
        raise UserError(f"liftdist eval {path}: {reason}")
