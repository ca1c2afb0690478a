"""Figures of answers, and their change since the base model, against values worked out by hand."""

import dataclasses
import math

import pytest

from liftdist.evaluation import scores
from liftdist.evaluation_settings import TaskConfig
from liftdist.runs import results
from liftdist.runs.results import Answer, Results


def answers(values, tokens=None, prompt="1 + "):
    of = tokens or [None] * len(values)
    return [Answer(n, f"{prompt}{n}", "", ["2"], None, value, of[n]) for n, value in enumerate(values)]


def changed(run_dir, metric, before, after, step=4):
    """What becomes of answers at step 0 and later ones."""
    if before:
        written = Results(run_dir)
        written.add(scores.figure(0, "sums", metric, before), before)
        written.close()
    return scores.change(run_dir, scores.figure(step, "sums", metric, after), after)


def test_a_perplexity_is_one_of_all_tokens(tmp_path):
    found = scores.figure(3, "news", "perplexity", answers([-2 * math.log(2), -math.log(16)], [2, 1]))
    assert (found.value, found.questions) == (pytest.approx(4), 2)  # 2^(5/2) if each text counted alike
    # draws: twice the first, one of each, twice the second, with probabilities 1/4, 1/2, 1/4
    assert (found.low, found.high) == (pytest.approx(2), pytest.approx(16))


def test_a_change_is_paired_by_question(tmp_path):
    found = changed(tmp_path, "accuracy", answers([0, 0, 0, 1, 0, 1]), answers([1, 1, 1, 1, 0, 0]))
    assert (found.step, found.task, found.metric, found.questions) == (4, "sums", "accuracy_change", 6)
    assert found.value == pytest.approx(2 / 6)
    assert found.p == pytest.approx(10 / 16)  # 3 better, 1 worse: 2 (1 + 4) / 2^4
    assert found.low < 0 < found.value < found.high
    everywhere = changed(tmp_path, "accuracy", answers([0, 0, 1, 0]), answers([0.5, 0.5, 1.5, 0.5]))
    assert (everywhere.low, everywhere.value, everywhere.high) == (0.5, 0.5, 0.5)  # scores by themselves spread more


def test_a_perplexity_has_a_change_with_an_interval(tmp_path):
    before, after = answers([-math.log(4)] * 30, [1] * 30), answers([-math.log(2)] * 29 + [-math.log(8)], [1] * 30)
    found = changed(tmp_path, "perplexity", before, after)
    assert found.value == pytest.approx(2 ** (32 / 30) - 4)
    assert found.low < found.value < found.high < 0
    assert found.p < 0.01


def test_only_questions_that_both_have_answered_count(tmp_path):
    """Those whose prompt, right answer or tokens are others by now have no partner."""
    after = [*answers([1, 1]), *answers([1, 1, 1], prompt="2 + ")[2:]]
    after.append(dataclasses.replace(answers([1, 1, 1, 1])[3], expected=["3"]))
    found = changed(tmp_path, "accuracy", answers([0, 1, 0, 0]), after)
    assert (found.value, found.questions) == (0.5, 2)
    assert changed(tmp_path, "accuracy", answers([0, 1]), answers([1, 1], prompt="2 + ")) is None
    exact, longer = (TaskConfig(name="sums", max_new_tokens=tokens, scorer="exact").how(()) for tokens in (16, 512))
    later = [dataclasses.replace(one, how=longer) for one in answers([1, 1])]
    earlier = [dataclasses.replace(one, how=exact) for one in answers([0, 0])]
    assert changed(tmp_path, "accuracy", earlier, later) is None
    assert changed(tmp_path, "accuracy", earlier, [dataclasses.replace(one, how=exact) for one in later]).value == 1


def test_other_options_are_another_question():
    """They may be in no prompt."""
    task = TaskConfig(name="chosen", kind="multiple_choice", options_field="options")
    assert task.how(("red", "blue")) == task.how(("red", "blue")) != task.how(("red", "green"))


def test_without_answers_of_the_base_model_there_is_no_change(tmp_path):
    assert changed(tmp_path, "accuracy", [], answers([1, 1])) is None
    assert not (tmp_path / results.FOLDER).exists()
