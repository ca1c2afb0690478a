"""What the answers to a task's questions come to, and how far that is from what the base model's come to.

accuracy             mean score of the answers; so are those scores of the lm-evaluation-harness that have a change
perplexity           exp(- log-likelihood of all replies / their tokens)
METRIC_change        METRIC after a step - METRIC before the first one, both of the questions that were asked each time

low and high are a percentile bootstrap over questions, 95 %, for a change over pairs of answers to one question; p is that of
:func:`liftdist.evaluation.statistics.paired`, of a perplexity for the log-likelihoods of replies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from liftdist.evaluation import statistics
from liftdist.runs import results
from liftdist.runs.results import Answer, Figure


def figure(step: int, task: str, metric: str, answers: Sequence[Answer]) -> Figure:
    """``metric``, accuracy or perplexity, of the answers, of which there must be some."""
    rows, measure = _rows(answers), _measure(answers)
    return Figure(step, task, metric, measure(rows), *statistics.bootstrap(rows, measure), len(rows))


def change(run_dir: Path, after: Figure, answers: Sequence[Answer]) -> Figure | None:
    """How far the figure of ``answers`` is from that before the first step; None if no question was asked then, in the same way.

    Raises:
        UserError: the earlier answers cannot be read.
    """
    if 0 not in results.steps(run_dir, after.task):
        return None
    before = {answer.question: answer for answer in results.read_answers(run_dir, after.task, 0)}
    both = [answer for answer in answers if answer.question in before]
    if not both:
        return None
    pairs = np.stack([_rows([before[answer.question] for answer in both]), _rows(both)], axis=1)  # [questions, 2, 2]
    measure = _measure(both)

    def difference(rows: np.ndarray) -> float:
        return measure(rows[:, 1]) - measure(rows[:, 0])

    low, high = statistics.bootstrap(pairs, difference)
    p = statistics.paired(pairs[:, 0, 0], pairs[:, 1, 0])
    return Figure(after.step, after.task, after.metric + results.CHANGE, difference(pairs), low, high, len(both), p)


def _rows(answers: Sequence[Answer]) -> np.ndarray:
    """``[questions, 2]``: score and tokens."""
    return np.array([(answer.score, answer.tokens or 0) for answer in answers], np.float64)


def _measure(answers: Sequence[Answer]) -> Callable[[np.ndarray], float]:
    """That of replies, whose tokens are known, or of answers."""
    return _mean_score if answers[0].tokens is None else _perplexity


def _mean_score(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean())


def _perplexity(rows: np.ndarray) -> float:
    return math.exp(-rows[:, 0].sum() / max(rows[:, 1].sum(), 1))
