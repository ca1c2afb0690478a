"""Intervals and p-values, against values worked out by hand."""

import pytest

from liftdist.evaluation import statistics


@pytest.mark.parametrize(
    ("scores", "interval"),
    [
        ([0.25, 0.25, 0.25], (0.25, 0.25)),
        ([0, 1], (0, 1)),  # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
        ([0, 0, 0, 1], (0, 0.75)),  # Binomial(4, 1/4): P(X <= 0) = 0.316, P(X <= 2) = 0.949, P(X <= 3) = 0.996
        ([0, 1] * 5, (0.2, 0.8)),  # Binomial(10, 1/2): P(X <= 1) = 0.011, P(X <= 2) = 0.055, and symmetric
    ],
)
def test_an_interval_holds_95_percent_of_the_means(scores, interval):
    assert statistics.bootstrap(scores, seed=1) == pytest.approx(interval)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(5, 1, 14 / 64), (6, 0, 2 / 64), (3, 3, 1.0), (0, 0, 1.0), (10, 2, 158 / 4096)],  # 2 (1 + 12 + 66) = 158
)
def test_mcnemar_counts_the_questions_that_changed(better, worse, p):
    unchanged = [0, 1, 1]
    first = [0] * better + [1] * worse + unchanged
    second = [1] * better + [0] * worse + unchanged
    assert statistics.paired(first, second) == pytest.approx(p)
    assert statistics.paired(second, first) == pytest.approx(p)


def test_graded_scores_are_compared_by_their_differences():
    # differences -0.2 and 0.6, mean 0.2; centred -0.4 and 0.4, whose means -0.4, 0, 0.4 have probabilities 1/4, 1/2, 1/4
    assert statistics.paired([0.4, 0.2], [0.2, 0.8]) == pytest.approx(0.5, abs=0.02)
    assert statistics.paired([0.1, 0.2, 0.3], [0.3, 0.4, 0.5]) < 0.001  # all alike
    assert statistics.paired([0.1, 0.3], [0.3, 0.1]) == 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="2 and 1 scores"):
        statistics.paired([0, 1], [1])
    with pytest.raises(ValueError, match="no scores"):
        statistics.paired([], [])
    with pytest.raises(ValueError, match="no scores"):
        statistics.bootstrap([])
