"""Frontiers, areas, intervals and tests of runs that are worked out by hand."""

import pytest

from bench import frontier

POINTS = [(0.1, 0.5), (0.3, 0.6), (0.9, 0.9)]


@pytest.mark.parametrize(("allowed", "accuracy"), [(0, 0.2), (0.1, 0.5), (0.29, 0.5), (0.3, 0.6), (2, 0.9)])
def test_a_frontier_is_the_best_that_forgets_no_more(allowed, accuracy):
    assert frontier.accuracy_within(POINTS, 0.2, allowed) == accuracy


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.2),
        ([(0.1, 0.5)], (0.1 * 0.2 + 0.3 * 0.5) / 0.4),
        (POINTS, (0.1 * 0.2 + 0.2 * 0.5 + 0.1 * 0.6) / 0.4),  # one of them beyond the limit
        ([(0.1, 0.5), (0.2, 0.4)], (0.1 * 0.2 + 0.3 * 0.5) / 0.4),  # the second is worse in both
        ([(-0.01, 0.3), (0.1, 0.5)], (0.1 * 0.3 + 0.3 * 0.5) / 0.4),  # an estimate below zero
        ([(0.1, 0.1)], 0.2),  # worse than the base model
    ],
)
def test_the_area_is_the_mean_height_up_to_the_limit(points, expected):
    assert frontier.area(points, 0.2, 0.4) == pytest.approx(expected)


def test_rates_are_chosen_by_their_area_in_development():
    rates = dict(zip((1.0, 2.0, 4.0), POINTS, strict=True))
    assert frontier.chosen(rates, 0.2, 0.4, 1) == [1.0]
    assert frontier.chosen(rates, 0.2, 0.4, 2) == [1.0, 2.0]
    assert frontier.chosen(rates, 0.2, 0.05, 1) == [1.0]  # all forget too much: the one that forgets least
    far = {1.0: (0.05, 0.0), 2.0: (0.15, 0.6), 4.0: (0.5, 0.9)}  # the first is worth nothing, the last is out of bounds
    assert frontier.chosen(far, 0.1, 0.3, 1) == [2.0]
    assert frontier._best(far, far, 0.3) == 2.0
    assert frontier._best({4.0: ()}, far, 0.3) == 4.0
    assert frontier.chosen({}, 0.2, 0.4, 2) == []


def test_holms_correction_multiplies_the_least_the_most():
    adjusted = frontier.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6})
    assert list(adjusted.items()) == [("a", 0.04), ("b", pytest.approx(0.09)), ("c", pytest.approx(0.09)), ("d", 0.6)]


def run(method, lr, scores, nats, seed=0, stage="test", status="finished"):
    return dict(
        task="sums", method=method, lr=lr, seed=seed, stage=stage, status=status, reason="", scores=scores,
        base_scores="0" * len(scores), forgotten=dict(own_text=nats, prose=2 * nats), figures=dict(capitals=nats),
    )  # fmt: skip


def result(*runs):
    rates = {"lift": [1e-3, 2e-3, 4e-3], "full": [1e-4, 2e-4]}
    return dict(settings=dict(methods=["lift", "full"], rates=rates, limit=0.4), runs=list(runs))


def test_intervals_and_tests_by_question():
    found = frontier.analyse(result(run("lift", 1e-3, "1" * 8, 0.1), run("full", 1e-4, "11110000", 0.1)))["sums"]
    assert (found["base_accuracy"], found["questions"], found["seeds"]) == (0, 8, [0])
    lift, full = (found["methods"][method]["own_text"] for method in ("lift", "full"))
    assert lift["area"] == pytest.approx(0.75)
    assert lift["interval"] == pytest.approx([0.75, 0.75])
    assert full["area"] == pytest.approx(0.75 * 0.5)
    assert full["interval"] == pytest.approx([0.75 / 8, 0.75 * 7 / 8])  # quantiles of the binomial distribution
    assert found["methods"]["lift"]["prose"]["area"] == pytest.approx(0.5)  # 0.2 nats forgotten
    against = found["against"]["full"]
    assert against["accuracy"] == 0.5
    assert against["p"] is against["p_holm"] is None  # one run of each says nothing of others
    assert against["at_edge"] == []
    assert against["area_own_text"] == pytest.approx([0.75 * 0.5, 0.75 / 8, 0.75 * 7 / 8])
    x, height, low, high = zip(*full["band"], strict=True)
    assert (x[0], x[-1], height[0], height[-1], high[0]) == (0, 0.4, 0, 0.5, 0)
    assert (low[-1], high[-1]) == (1 / 8, 7 / 8)


def test_intervals_know_how_seeds_differ():
    runs = [run("lift", 1e-3, "1" * 8, 0.1, seed=0), run("lift", 1e-3, "1" * 8, 0.3, seed=1)]
    found = frontier.analyse(result(*runs))["sums"]["methods"]["lift"]["own_text"]
    assert found["area"] == pytest.approx(0.5)
    # one draw of four has the same seed twice, and two seeds spread sqrt(2) times as far as they seem to
    assert found["interval"] == pytest.approx([0.5 - 0.25 * 2**0.5, 0.5 + 0.25 * 2**0.5])


def test_differences_are_sure_only_if_they_are_more_than_those_of_runs():
    def against(*of_full):
        of_lift = ["11110000", "00001111"]
        runs = [run("lift", 1e-3, scores, 0.1, seed=seed) for seed, scores in enumerate(of_lift)]
        runs += [run("full", 1e-4, scores, 0.1, seed=seed) for seed, scores in enumerate(of_full)]
        return frontier.analyse(result(*runs))["sums"]["against"]["full"]

    assert against("11110000", "00001111")["p"] == 1
    assert against("00001111", "11110000")["p"] > 0.5
    surely = against("00000000", "00000000")
    assert surely["accuracy"] == 0.5
    assert surely["p"] == surely["p_holm"] < 0.05


def test_without_the_reference_nothing_is_compared():
    failed = run("lift", 1e-3, "", 0.0, status="failed")
    found = frontier.analyse(result(failed, run("full", 1e-4, "1100", 0.1)))["sums"]
    assert (found["reference"], found["against"]) == ("lift", {})


def test_methods_are_compared_on_the_seeds_that_they_share_and_without_rates_that_failed():
    failed = run("lift", 2e-3, "", 0.0, status="failed") | {"reason": "loss is not finite"}
    runs = [
        run("lift", 1e-3, "1111", 0.1, seed=0),
        run("lift", 1e-3, "0000", 0.1, seed=1),
        run("lift", 2e-3, "1111", 0.0, seed=1),
        failed,
        run("full", 1e-4, "1100", 0.1, seed=0),
    ]
    found = frontier.analyse(result(*runs))["sums"]
    assert found["seeds"] == [0]
    assert [(one["lr"], one["accuracy"]) for one in found["methods"]["lift"]["rates"]] == [(1e-3, 1.0)]
    assert found["failed"] == [dict(method="lift", lr=2e-3, seed=0, stage="test", reason="loss is not finite")]


def test_methods_are_tested_at_the_rate_that_is_best_in_development():
    runs = [
        run("lift", 1e-3, "1000", 0.1, stage="development"),
        run("lift", 2e-3, "1100", 0.1, stage="development"),
        run("full", 2e-4, "1100", 0.1, stage="development"),
        run("lift", 1e-3, "1111", 0.1),
        run("lift", 2e-3, "1110", 0.1),
        run("full", 2e-4, "1000", 0.1),
    ]
    found = frontier.analyse(result(*runs))["sums"]
    assert found["methods"]["lift"]["best_lr"] == 2e-3
    assert found["against"]["full"]["accuracy"] == 0.5
    assert found["development"]["lift"]["at_edge"] is False
    assert found["development"]["full"]["at_edge"] is True


def test_development_alone_has_no_frontier():
    found = frontier.analyse(result(run("lift", 1e-3, "10", 0.1, stage="development")))["sums"]
    assert found["seeds"] == []
    assert found["development"]["lift"]["rates"] == [dict(lr=1e-3, own_text=0.1, accuracy=0.5)]
