"""What the runs of ``python -m bench fidelity`` say: target accuracy against forgetting, on numpy alone.

    frontier of a method     A(x) = the greatest accuracy of the base model and of its rates that forget at most x nats a token
    area                     mean of A(x) over 0 <= x <= limit
    bands, intervals         percentiles of a bootstrap, 95 %: seeds and questions are drawn with replacement, those of all
                             methods together; the spread of k seeds is widened by sqrt(k / (k - 1)), as they are few
    p                        of a method's best rate within the limit against the reference's, by the same bootstrap of the
                             difference of accuracies; then with Holm's correction (1979) for all methods. None of one seed

A rate's accuracy and forgetting are means over the seeds that all rates have in common. A rate with a failed run is on no
frontier. A(x) is a maximum of what was measured, so it is too high where rates are many and questions few: give methods equally
many rates. With one seed, the intervals know nothing of how runs differ. The texts on which forgetting is measured are the same
in all runs and are not drawn anew: no interval knows how others would differ. Intervals of areas are those of one comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np

FORGOTTEN = ("own_text", "prose")  # nats a token
DRAWS, PLACES = 2000, 61
Points = Sequence[tuple[float, float]]  # forgetting and accuracy of each rate


def accuracy_within(points: Points, base: float, allowed: float) -> float:
    """A(``allowed``)."""
    return max([base, *(accuracy for forgotten, accuracy in points if forgotten <= allowed)])


def area(points: Points, base: float, limit: float) -> float:
    """The mean of A(x) over 0 <= x <= ``limit``. Negative forgetting, which is an error of estimation, counts as none."""
    corners = sorted({0.0, limit, *(max(0.0, forgotten) for forgotten, _ in points if forgotten < limit)})
    pieces = pairwise(corners)
    return sum((end - begin) * accuracy_within(points, base, begin) for begin, end in pieces) / limit


def chosen(rates: Mapping[float, tuple[float, float]], base: float, limit: float, number: int) -> list[float]:
    """The ``number`` rates whose frontier has the greatest area; of equal ones those of the greatest accuracy within the limit,
    and then those that forget least."""

    def worth(some: Sequence[float]) -> tuple[float, float, float]:
        points = [rates[rate] for rate in some]
        within = sum(accuracy for forgotten, accuracy in points if forgotten <= limit)
        return area(points, base, limit), within, -sum(forgotten for forgotten, _ in points)

    return sorted(max(combinations(sorted(rates), min(number, len(rates))), key=worth, default=()))


def sweep(runs: Sequence[dict[str, Any]], task: str, method: str) -> dict[float, tuple[float, float]]:
    """Forgetting on the base model's own text, and accuracy, by the rates of the development runs that have all finished."""
    found = _by_rate([run for run in runs if run["stage"] == "development" and run["task"] == task], method)
    return {
        rate: (
            float(np.mean([run["forgotten"]["own_text"] for run in of_rate])),
            float(np.mean([_scores(run["scores"]).mean() for run in of_rate])),
        )
        for rate, of_rate in found.items()
    }


def analyse(result: Mapping[str, Any]) -> dict[str, Any]:
    """By task what the runs of a result file say of each method, and of the first against each other one.

    Args:
        result: ``settings`` with ``methods``, the reference first, ``rates`` by method, and ``limit``; and ``runs``, each with
            ``task``, ``method``, ``lr``, ``seed``, ``stage`` and ``status``; of finished ones ``scores`` and ``base_scores``,
            a text with 0 or 1 for each question, ``forgotten``, nats a token by measure (:data:`FORGOTTEN`), and ``figures``.
    """
    return {task: _of_task(result, task) for task in dict.fromkeys(run["task"] for run in result["runs"])}


def _of_task(result: Mapping[str, Any], task: str) -> dict[str, Any]:
    settings, runs = result["settings"], [run for run in result["runs"] if run["task"] == task]
    methods = [method for method in settings["methods"] if any(run["method"] == method for run in runs)]
    tests = [run for run in runs if run["stage"] == "test"]
    swept = {method: sweep(runs, task, method) for method in methods}
    failed = [
        {key: run[key] for key in ("method", "lr", "seed", "stage", "reason")}
        for run in runs
        if run["status"] != "finished"
    ]
    known = next((_scores(run["base_scores"]).mean() for run in runs if run["status"] == "finished"), 0.0)
    found: dict[str, Any] = {
        "development": {m: _sweep(settings, m, swept[m], known) for m in methods},
        "failed": failed,
    }
    rates = {method: _by_rate(tests, method) for method in methods}
    of_rates = [{run["seed"] for run in of_rate} for of in rates.values() for of_rate in of.values()]
    seeds = sorted(set.intersection(*of_rates)) if of_rates else []
    if not seeds:
        return found | {"seeds": []}
    base = _scores(next(run for run in tests if run["status"] == "finished")["base_scores"])
    kept = {
        method: {
            lr: sorted((r for r in some if r["seed"] in seeds), key=lambda r: r["seed"]) for lr, some in of.items()
        }
        for method, of in rates.items()
    }
    random = np.random.default_rng(0)
    draws = _widened(_counts(random, len(seeds))), _counts(random, len(base))
    areas = {}
    of_methods: dict[str, Any] = {}
    for method in (method for method in methods if kept[method]):
        best = _best(kept[method], swept[method], settings["limit"])
        of_methods[method] = {"best_lr": best, "rates": [_rate(lr, some) for lr, some in kept[method].items()]}
        for measure in FORGOTTEN:
            drawn, frontier = _frontier(kept[method], base, measure, settings["limit"], draws)
            areas[method, measure] = drawn
            of_methods[method][measure] = frontier
    reference, others = methods[0], [method for method in of_methods if method != methods[0]]
    found |= {"seeds": seeds, "questions": len(base), "base_accuracy": float(base.mean()), "methods": of_methods}
    against: dict[str, Any] = {}
    for other in others if reference in of_methods else ():
        mine, theirs = (_all_scores(kept[m][of_methods[m]["best_lr"]]) for m in (reference, other))
        against[other] = {
            f"area_{measure}": _interval(
                of_methods[reference][measure]["area"] - of_methods[other][measure]["area"],
                areas[reference, measure] - areas[other, measure],
            )
            for measure in FORGOTTEN
        } | {
            "accuracy": float(mine.mean() - theirs.mean()),
            "p": _p(mine - theirs, draws),
            "p_holm": None,
            "at_edge": [method for method in (reference, other) if found["development"][method]["at_edge"]],
        }
    for other, p in holm({other: one["p"] for other, one in against.items() if one["p"] is not None}).items():
        against[other]["p_holm"] = p
    return found | {"reference": reference, "against": against}


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several hypotheses, adjusted so that none is rejected wrongly with more than the level's probability."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in values}


def _p(differences: np.ndarray, draws: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Of differences ``[seeds, questions]`` whose mean is as far from 0, were there none; None if runs of one seed alone tell."""
    if len(differences) == 1:
        return None
    by_seed, by_question = draws
    drawn = ((by_seed @ differences) * by_question).sum(axis=1)
    return min(1.0, 2 * (1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))) / (1 + DRAWS))


def _sweep(
    settings: Mapping[str, Any], method: str, rates: Mapping[float, tuple[float, float]], base: float
) -> dict[str, Any]:
    """``at_edge``: the rate of the greatest area is the first or last that was tried, so that a better one may lie beyond."""
    best = next(iter(chosen(rates, base, settings["limit"], 1)), None)
    return {
        "rates": [
            {"lr": lr, "own_text": forgotten, "accuracy": accuracy} for lr, (forgotten, accuracy) in rates.items()
        ],
        "at_edge": best in (min(settings["rates"][method]), max(settings["rates"][method])),
    }


def _best(of: Mapping[float, Any], swept: Mapping[float, tuple[float, float]], limit: float) -> float:
    """The rate of greatest accuracy within the limit in development, not by the questions of the test; if all forget more, of
    the least forgetting."""

    def worth(lr: float) -> tuple[float, float]:
        forgotten, accuracy = swept.get(lr, (np.inf, -1.0))
        return (accuracy, 0.0) if forgotten <= limit else (-1.0, -forgotten)

    return max(of, key=worth)


def _by_rate(runs: Sequence[dict[str, Any]], method: str) -> dict[float, list[dict[str, Any]]]:
    """The runs of a method by rate, without rates of which a run has failed."""
    found: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        if run["method"] == method:
            found.setdefault(run["lr"], []).append(run)
    return {lr: some for lr, some in sorted(found.items()) if all(run["status"] == "finished" for run in some)}


def _rate(lr: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    figures = {name: float(np.mean([run["figures"][name] for run in runs])) for name in runs[0]["figures"]}
    forgotten = {name: float(np.mean([run["forgotten"][name] for run in runs])) for name in FORGOTTEN}
    return {"lr": lr, "accuracy": float(_all_scores(runs).mean()), "forgotten": forgotten, "figures": figures}


def _frontier(
    of: Mapping[float, Sequence[dict[str, Any]]],
    base: np.ndarray,
    measure: str,
    limit: float,
    draws: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Areas ``[DRAWS]``, and the frontier with its band: ``[x, A(x), low, high]`` at equal distances."""
    by_seed, by_question = draws
    base_drawn = by_question @ base
    accuracy, forgotten = [], []  # of each rate [1 + DRAWS], the first of all runs and questions
    for runs in of.values():
        scores = _all_scores(runs)
        nats = np.array([run["forgotten"][measure] for run in runs])
        accuracy.append([scores.mean(), *((by_seed @ scores) * by_question).sum(axis=1)])
        forgotten.append([nats.mean(), *(by_seed @ nats)])
    drawn = [
        ([*zip(nats, right, strict=True)], known)
        for nats, right, known in zip(
            np.transpose(forgotten).tolist(), np.transpose(accuracy).tolist(), [base.mean(), *base_drawn], strict=True
        )
    ]
    areas = np.array([area(points, known, limit) for points, known in drawn])
    places = np.linspace(0, limit, PLACES)
    heights = np.array([[accuracy_within(points, known, x) for x in places] for points, known in drawn])
    low, high = np.percentile(heights[1:], [2.5, 97.5], axis=0)
    band = np.stack([places, heights[0], low, high], axis=1).round(6).tolist()
    return areas[1:], {"area": float(areas[0]), "interval": _interval(areas[0], areas[1:])[1:], "band": band}


def _interval(value: float, drawn: np.ndarray) -> list[float]:
    """A value and the ends of its 95 % interval."""
    return [float(value), *(float(end) for end in np.percentile(drawn, [2.5, 97.5]))]


def _counts(random: np.random.Generator, number: int) -> np.ndarray:
    """``[DRAWS, number]``, the share that each has of a sample of as many, drawn with replacement."""
    return random.multinomial(number, np.full(number, 1 / number), DRAWS) / number


def _scores(text: str) -> np.ndarray:
    return np.array([*map(float, text)])


def _widened(shares: np.ndarray) -> np.ndarray:
    """Shares of k seeds ``[DRAWS, k]`` as far from equal ones as makes the spread of means unbiased."""
    seeds = shares.shape[1]
    return shares if seeds == 1 else 1 / seeds + (shares - 1 / seeds) * (seeds / (seeds - 1)) ** 0.5


def _all_scores(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """``[seeds, questions]``."""
    return np.array([_scores(run["scores"]) for run in runs])
