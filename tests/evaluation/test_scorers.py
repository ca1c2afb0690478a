"""Scores of answers, worked out by hand."""

import signal
import threading

import pytest

from liftdist.evaluation import generators
from liftdist.evaluation_settings import TaskConfig
from liftdist.registry import SCORERS


def scorer(name, **settings):
    return SCORERS.load(name).make(TaskConfig(name="t", scorer=name, **settings))


def scored(made, answer, *expected):
    """The score, and what was taken from the answer."""
    return made.score(answer, [made.expected(one) for one in expected], {})[:2]


@pytest.mark.parametrize(
    ("answer", "expected", "found", "score"),
    [
        ("The answer is 18.", "18", "18", 1),
        ("He makes $1,234.50 a year", "1234.5", "1234.50", 1),
        ("so he pays $2,304", "#### 2,304", "2304", 1),
        ("first 3, then 4, so 7 apples", "7", "7", 1),
        ("lists 1, 234", "234", "234", 1),
        ("lists 1,234,567 and 12345", "12345", "12345", 1),
        ("it falls to -5 degrees", "-5", "-5", 1),
        ("it falls to \u22125 degrees", "-5", "-5", 1),
        ("a loss of -$5.25", "-5.25", "-5.25", 1),
        ("a loss of $-5", "-5.0", "-5", 1),
        ("10-3", "3", "3", 1),
        ("(10)-3", "3", "3", 1),
        ("-3", "3", "-3", 0),
        ("3/4 of it", "0.75", "3/4", 1),
        ("-3/4", "-0.75", "-3/4", 1),
        (r"$\frac{3}{4}$", "0.75", "3/4", 1),
        (r"$-\frac{-3}{4}$", "0.75", "3/4", 1),
        (r"\dfrac{1,000}{8}", "125", "1000/8", 1),
        ("3/0", "0", "0", 1),
        (r"\boxed{42}", "42", "42", 1),
        (".5 litres", "0.5", ".5", 1),
        ("that makes 18.", "18.0", "18", 1),
        ("50%", "50", "50", 1),
        ("1.5e-3", "0.0015", "1.5e-3", 1),
        ("2e3", "2000", "2e3", 1),
        ("It is 0.333", "1/3", "0.333", 1),
        ("It is 0.332", "1/3", "0.332", 0),
        ("It is 1.001", "1", "1.001", 1),
        ("It is 1.0011", "1", "1.0011", 0),
        ("18 or 19", "18", "19", 0),
        ("none at all", "0", None, 0),
        ("", "0", None, 0),
    ],
)
def test_last_number(answer, expected, found, score):
    assert scored(scorer("last_number"), answer, expected) == (score, found)


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ("it takes 3 1/2 hours", "3.5", "7/2"),
        ("-3 1/2", "-3.5", "-7/2"),
        (r"\boxed{3\frac{1}{2}}", "3.5", "7/2"),
        ("of 3 7/2", "3.5", "7/2"),  # no mixed number
        (r"\boxed{1{,}234}", "1234", "1234"),
        (r"1\,234\,567", "1234567", "1234567"),
        (r"\frac12", "0.5", "1/2"),
        ("1.0e+400", "1" + "0" * 400, "1.0e+400"),
        ("x = - 5", "-5", "-5"),
        ("7 - 5", "5", "5"),
        ("\u20135", "-5", "-5"),
        ("5\u201310", "10", "10"),
    ],
)
def test_last_number_of_other_forms(answer, expected, found):
    assert scored(scorer("last_number"), answer, expected) == (1, found)


def test_long_numbers_that_differ_are_not_equal():
    assert scored(scorer("last_number"), "9" * 60, "9" * 59 + "8")[0] == 0


def test_last_number_with_another_tolerance_and_several_answers():
    made = scorer("last_number", tolerance=0.5)
    assert scored(made, "12.5", "12") == (1, "12.5")
    assert scored(made, "12.6", "12") == (0, "12.6")
    assert scored(made, "12.6", "12", "13") == (1, "12.6")


@pytest.mark.parametrize("said", ["9" * 20000, "1," * 10000 + "000", "0." + "3" * 20000, "1" * 9000 + "/" + "7" * 9000])
def test_endless_numbers_are_only_wrong(said):
    """A model that repeats itself may write digits without end."""
    assert scored(scorer("last_number"), said, "3")[0] == 0


LETTERS, WORDS = ["A", "B", "C", "D", "E"], ["true", "false"]
ANSWERS = ["answer1", "answer2", "answer10"]


@pytest.mark.parametrize(
    ("options", "inside", "answer", "expected", "found", "score"),
    [
        (LETTERS, False, "The answer is (C).", "C", "C", 1),
        (LETTERS, False, "Answer: B, not C", "B", "B", 1),
        (LETTERS, False, "Clearly D", "D", "D", 1),
        (LETTERS, True, "Clearly D", "D", "C", 0),  # as the authors have it
        (LETTERS, False, "it is a or b", "A", None, 0),
        (LETTERS, False, "C_1 and B", "B", "B", 1),
        (LETTERS, False, "", "A", None, 0),
        (WORDS, False, "the correct answer is True", "true", "true", 1),
        (WORDS, False, "the correct answer is true", "True", "true", 1),
        (WORDS, False, "that is untrue, so false", "false", "false", 1),
        (WORDS, True, "that is untrue, so false", "false", "true", 0),
        (WORDS, False, "maybe", "false", None, 0),
        (ANSWERS, False, "the correct answer is answer10", "answer10", "answer10", 1),
        (ANSWERS, True, "the correct answer is answer10", "answer10", "answer10", 1),
        (ANSWERS[:2], False, "the correct answer is answer10", "answer1", None, 0),
        (["(x)", "x."], False, "x.", "x.", "x.", 1),
    ],
)
def test_option(options, inside, answer, expected, found, score):
    assert scored(scorer("option", options=options, inside_words=inside), answer, expected) == (score, found)


@pytest.mark.parametrize(
    ("name", "answer", "expected", "found", "score"),
    [
        ("exact", " Paris\n", ["Paris"], "Paris", 1),
        ("exact", "paris", ["Paris"], "paris", 0),
        ("exact", "Lutetia", ["Paris", " Lutetia "], "Lutetia", 1),
        ("exact", "It is Paris", ["Paris"], "It is Paris", 0),
        ("exact", " ", ["Paris"], None, 0),
        ("contains", "It is Paris.", ["Rome", "Paris"], "Paris", 1),
        ("contains", "It is paris.", ["Paris"], None, 0),
    ],
)
def test_whole_answers(name, answer, expected, found, score):
    assert scored(scorer(name), answer, *expected) == (score, found)


@pytest.mark.parametrize(
    ("pattern", "answer", "expected", "found", "score"),
    [
        ("#### (-?[0-9]+)", "a\n#### 18", "b\n#### 18", "18", 1),
        ("#### (-?[0-9]+)", "#### 17\n#### 18", "18", "18", 1),
        ("#### (-?[0-9]+)", "18", "18", None, 0),
        ("is (yes)|no", "no", "yes", None, 0),
        ("<a>(.*?)</a>", "<a> x </a>", "x", "x", 1),
    ],
)
def test_regex(pattern, answer, expected, found, score):
    assert scored(scorer("regex", pattern=pattern), answer, expected) == (score, found)


@pytest.mark.parametrize(
    ("answer", "expected", "found", "score"),
    [
        (r"So it is $\boxed{\frac{1}{2}}$.", r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"So it is $\frac{2}{4}$", r"\frac{1}{2}", r"\frac{2}{4}", 1),
        (r"\boxed{\{3,1,2\}}", r"$\{1,2,3\}$", r"\{3,1,2\}", 1),
        (r"$(1,2]\cup[3,4]$", r"\boxed{[3,4]\cup(1,2]}", r"(1,2]\cup[3,4]", 1),
        (r"$[0,1]$", "$[0,1)$", "[0,1]", 0),
        (r"$(x+1)^2$", "x^2+2x+1", "(x+1)^2", 1),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", r"\sqrt{8}", 1),
        ("the final answer is 1,234", "1234", "1234", 1),
        (r"$\boxed{3}$ rather than $4$", "4", "3", 0),
        ("I cannot say", "4", None, 0),
    ],
)
def test_math_verify(answer, expected, found, score):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert scored(scorer("math_verify"), answer, expected) == (score, found)


def test_math_verify_ends_and_leaves_signals_as_they_were():
    """What would take for ever to compute is wrong; on other threads there is no time limit, so it is refused."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    made, before = scorer("math_verify"), signal.getsignal(signal.SIGALRM)
    assert made.score("$9^{9^{9^{9}}}$", ["$2$"], {}) == (0, "9^{9^{9^{9}}}", True)
    assert not made.score("$3$", ["$2$"], {}).timed_out
    assert signal.getsignal(signal.SIGALRM) == before
    raised = []

    def on_another_thread():
        with pytest.raises(ValueError, match="thread") as error:
            made.score("$1$", ["$1$"], {})
        raised.append(error)

    thread = threading.Thread(target=on_another_thread)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_reasoning_gym():
    task = TaskConfig(generator="countdown", size=2, seed=3)
    record = generators.dataset(task)[0]
    made = SCORERS.load(task.scored_by).make(task)
    right = record["metadata"]["expression"]
    assert made.score(f"I try. <answer>{right}</answer>", [], record)[:2] == (1.0, right)
    assert made.score(right, [], record)[:2] == (1.0, right)
    assert made.score("<answer>1</answer>", [], record).score < 0.5
    assert made.score("", [], record).extracted is None


@pytest.mark.parametrize(
    ("made", "expected", "problem"),
    [
        (scorer("last_number"), "none", "holds no number"),
        (scorer("option", options=LETTERS), "F", "is none of the options A, B, C, D, E"),
        (scorer("option", options=WORDS), "it is true", "is none of the options true, false"),
        (scorer("exact"), " ", "is empty"),
        (scorer("contains"), "", "is empty"),
        (scorer("regex", pattern="(x)"), "", "is empty"),
    ],
)
def test_an_expected_answer_that_none_could_equal_is_refused(made, expected, problem):
    with pytest.raises(ValueError, match=problem):
        made.expected(expected)
