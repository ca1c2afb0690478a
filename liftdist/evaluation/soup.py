"""Greedy model soup (Wortsman et al. 2022, arXiv 2203.05482): the mean of those deltas that help, as tasks say.

    by falling score of base + D_i:    soup = {first}; each further one joins if score(mean of soup and it) >= score(mean of soup)

:mod:`liftdist.evaluation.candidates` says what a score is. The base model is asked for comparison alone. What is chosen by these
questions should be measured by others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from liftdist.deltas import merge
from liftdist.deltas.delta import Delta
from liftdist.errors import UserError
from liftdist.evaluation.candidates import HEADING, Ask, scored
from liftdist.models.weights import ModelFolder


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
        score = scored(ask, candidate, line, say)
        return -math.inf if math.isnan(score) else score

    def mean(of: Sequence[Delta]) -> Delta:
        return merge.merged(of, "mean", {}, location, base)

    say(HEADING)
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
