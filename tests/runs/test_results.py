"""Results are read as they were written, whatever happened to the run in between."""

import json
import math

import pytest

from liftdist.errors import UserError
from liftdist.runs import results
from liftdist.runs.results import Answer, Figure, Results


def figure(step, value=0.5, task="gsm8k", metric="accuracy"):
    return Figure(step, task, metric, value, value / 2, value * 1.5, 2)


ANSWERS = [
    Answer(0, "1+2=", "3\n\u2028\U0001f600", ["3", "3.0"], "3", 1.0),
    Answer(1, "</script>", "\ud800", ["4"], None, 0.0),
]


def test_what_was_written_is_read(tmp_path):
    written = Results(tmp_path)
    written.add(figure(100), ANSWERS)
    written.add(figure(0, task="math"))
    written.close()
    assert results.read(tmp_path) == [figure(0, task="math"), figure(100)]
    assert results.read_answers(tmp_path, "gsm8k", 100) == ANSWERS
    assert results.steps(tmp_path, "gsm8k") == [100]
    assert results.steps(tmp_path, "math") == []
    first = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])
    assert list(first) == ["step", "task", "metric", "value", "low", "high", "questions", "p"]
    question = json.loads((tmp_path / "eval/gsm8k/step-00000100.jsonl").read_text().split("\n")[0])
    assert list(question) == ["id", "prompt", "answer", "expected", "extracted", "score", "tokens", "how", "timed_out"]


def test_a_run_that_continues_drops_what_it_will_find_again(tmp_path):
    written = Results(tmp_path)
    for step in (0, 100, 200):
        written.add(figure(step), ANSWERS)
    written.close()
    again = Results(tmp_path, after=100)
    assert results.read(tmp_path) == [figure(0), figure(100)]
    assert results.steps(tmp_path, "gsm8k") == [0, 100]
    again.add(figure(150), ANSWERS[:1])
    again.close()
    assert [one.step for one in results.read(tmp_path)] == [0, 100, 150]
    assert results.read_answers(tmp_path, "gsm8k", 150) == ANSWERS[:1]


@pytest.mark.parametrize("torn", [1, 30])
def test_a_torn_last_line_is_left_out_and_removed(tmp_path, torn):
    """Also one that only lacks its end, to which the next would be appended."""
    written = Results(tmp_path)
    written.add(figure(0))
    written.add(figure(100))
    written.close()
    path = tmp_path / "eval.jsonl"
    path.write_text(path.read_text()[:-torn])
    assert results.read(tmp_path) == [figure(0)]
    again = Results(tmp_path, after=100)
    again.add(figure(100, 0.75))
    again.close()
    assert results.read(tmp_path) == [figure(0), figure(100, 0.75)]


def test_an_evaluation_done_again_replaces_the_earlier_one(tmp_path):
    written = Results(tmp_path)
    written.add(figure(100, 0.25), ANSWERS)
    written.add(figure(100, 0.75), ANSWERS[:1])
    written.close()
    assert results.read(tmp_path) == [figure(100, 0.75)]
    assert results.read_answers(tmp_path, "gsm8k", 100) == ANSWERS[:1]


def test_values_that_are_not_finite_are_null(tmp_path):
    written = Results(tmp_path)
    written.add(Figure(0, "wiki", "perplexity", math.inf, math.nan, None, 3))
    written.close()
    assert results.read(tmp_path) == [Figure(0, "wiki", "perplexity", None, None, None, 3)]


def test_what_is_cut_short_or_of_another_version_is_left_out(tmp_path):
    written = Results(tmp_path)
    written.add(figure(1), ANSWERS)
    written.close()
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 1}\n[1]\n{"step": "x", "task": "gsm8k", "metric": "accuracy", "value": 1}\n')
        file.write('{"step": 2, "task": "gsm8k", "metric": "accuracy", "value": 0.5, "later": 1}\n')
    with (tmp_path / "eval/gsm8k/step-00000001.jsonl").open("ab") as file:
        file.write(
            b'{"id": 2, "prompt": "", "answer": "", "expected": "3", "extracted": null, "score": 1}\n{"id": "\xc3'
        )
    assert results.read(tmp_path) == [figure(1), Figure(2, "gsm8k", "accuracy", 0.5)]
    assert results.read_answers(tmp_path, "gsm8k", 1) == ANSWERS
    assert results.tasks(tmp_path) == ["gsm8k"]


def test_results_are_of_one_base_model(tmp_path):
    for sha256 in ("a", "a"):
        results.check_base(tmp_path, sha256)
    results.check_base(tmp_path, "wrong")  # nothing was asked, as where the model could not be loaded
    results.check_base(tmp_path, "a")
    written = Results(tmp_path, after=1)  # as the run that continues opens them
    written.add(figure(1))
    written.close()
    with pytest.raises(UserError, match="holds answers of another model than model.path, or .*; give another run_dir"):
        results.check_base(tmp_path, "b")


def test_what_cannot_be_read_is_refused(tmp_path):
    assert results.read(tmp_path) == []
    with pytest.raises(UserError, match="gsm8k/step-00000001.jsonl: No such file"):
        results.read_answers(tmp_path, "gsm8k", 1)
    (tmp_path / "eval.jsonl").symlink_to(__file__)
    with pytest.raises(UserError, match="eval.jsonl"):
        results.read(tmp_path)
    (tmp_path / "eval.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "step-00000009.jsonl").touch()
    (tmp_path / "eval").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a folder"):
        Results(tmp_path, after=1)
    assert (tmp_path / "elsewhere" / "step-00000009.jsonl").exists()
    with pytest.raises(UserError, match="is not a folder"):
        Results(tmp_path).add(figure(1), ANSWERS)
