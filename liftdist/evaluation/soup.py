"""Greedy model soup (Wortsman et al. 2022, arXiv 2203.05482): the mean of those deltas that help, as tasks say.

    by falling score of base + D_i:    soup = {first}; each further one joins if score(mean of soup and it) >= score(mean of soup)

score    mean over tasks of their accuracy; or of their perplexity, negative

Each candidate is written as a model folder, asked by ``liftdist eval`` in processes of its own, and removed. The base model is
asked for comparison alone. What is chosen by these questions should be measured by others.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from liftdist import config as configs
from liftdist import files
from liftdist.deltas import merge
from liftdist.deltas.delta import Delta
from liftdist.deltas.formats import hf
from liftdist.errors import UserError
from liftdist.evaluation_settings import OWN_TEXT, PERPLEXITY
from liftdist.models.weights import ModelFolder
from liftdist.runs import layout, results
from liftdist.schema import Config

Ask = Callable[[Delta | None], float]  # the score of the base model with a delta applied, or as it is


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


def greedy(
    deltas: Sequence[Delta],
    base: ModelFolder,
    ask: Ask,
    tasks: Sequence[str],
    location: Path,
    say: Callable[[str], None],
) -> Delta:
    """The mean of those deltas that together score best; ``made`` says which.

    Args:
        tasks: their names, to be kept with the result.
        location: names the result in messages.
        say: is given the lines of a table: the score of each candidate.

    Raises:
        UserError: as ``ask`` and :func:`liftdist.deltas.merge.merged`; or no delta has a score.
    """

    def asked(candidate: Delta | None, line: str) -> float:
        score = ask(candidate)
        say(f"{score:>10.4f}  {line}")
        return -math.inf if math.isnan(score) else score

    def mean(of: Sequence[Delta]) -> Delta:
        return merge.merged(of, "mean", {}, location, base)

    say(f"{'score':>10}  candidate")
    of_base = asked(None, "the base model")
    scores = [asked(mean([delta]), merge.title(delta)) for delta in deltas]
    order = sorted(range(len(deltas)), key=lambda place: -scores[place])
    chosen, best = order[:1], scores[order[0]]
    if best == -math.inf:
        raise UserError("--rule greedy: no delta has a score that is finite; see the answers of liftdist eval")
    for place in order[1:]:
        together = sorted([*chosen, place])
        score = asked(mean([deltas[one] for one in together]), " + ".join(merge.title(deltas[one]) for one in together))
        if score >= best:
            chosen, best = together, score
    left_out = [deltas[place] for place in range(len(deltas)) if place not in chosen]
    for delta in left_out:
        say(f"left out: {merge.title(delta)}")
    if best < of_base:
        say("the base model scores higher than what is written")
    made = mean([deltas[place] for place in chosen])
    about = {
        "merge": "greedy",
        "tasks": list(tasks),
        "score": best,
        "score_of_base": of_base,
        "deltas": made.made["deltas"],
        "left_out": [merge.of(delta) for delta in left_out],
    }
    return replace(made, made=about)


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
