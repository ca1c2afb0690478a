"""Settings of tasks: shipped ones by name, and combinations that make no sense are refused in one line."""

import json
import re
import sys

import guide
import pytest
import yaml
from commands import ROOT

from liftdist import config as configs
from liftdist.errors import UserError
from liftdist.evaluation.questions import questions
from liftdist.evaluation_settings import TaskConfig, shipped_tasks

FILE = "run_dir: r\nmodel: {path: m}\ndata: {path: x.jsonl}\nselection: {density: 0.05}\neval:\n  tasks:\n"
GIVEN = "  - {name: t, path: t.jsonl, scorer: exact}\n"
ALPACA = {"instruction": "1+2", "input": "", "output": "It is 3"}
HUB = {"gsm8k": {"question": "1+2", "answer": "1+2 is <<1+2=3>>3\n#### 3"}}
HUB["math"] = HUB["math500"] = {"problem": "1+2", "solution": r"It is $\boxed{3}$.", "answer": "3"}


def load(tmp_path, tasks, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(FILE + tasks)
    return configs.load(path, overrides)


def problem(tmp_path, tasks, *overrides):
    with pytest.raises(UserError) as error:
        load(tmp_path, tasks, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_name_stands_for_the_settings_of_a_shipped_task(tmp_path):
    config, text = load(
        tmp_path, f"  - gsm8k\n  - task: commonsense/piqa\n    name: some\n    limit: 7\n    temperature: 0\n{GIVEN}"
    )
    gsm8k, some, own = config.eval.tasks
    assert (gsm8k.title, gsm8k.path, gsm8k.subset, gsm8k.scorer) == ("gsm8k", "openai/gsm8k", "main", "last_number")
    assert (some.title, some.limit, some.options) == ("some", 7, ["solution1", "solution2"])
    assert (own.title, own.path) == ("t", "t.jsonl")
    (tmp_path / "again.yaml").write_text(text)  # what is kept reads back
    assert configs.load(tmp_path / "again.yaml")[0] == config


def test_what_is_set_besides_wins_also_if_it_is_the_default(tmp_path):
    config, _ = load(tmp_path, "  - {task: commonsense/boolq, inside_words: false, options: [yes, no]}\n")
    (task,) = config.eval.tasks
    assert (task.title, task.inside_words, task.options) == ("commonsense_boolq", False, ["yes", "no"])


def test_shipped_tasks_on_the_command_line(tmp_path):
    config, _ = load(tmp_path, GIVEN, "eval.tasks=[gsm8k, {task: arithmetic/svamp, name: m}, reasoning_gym/chain_sum]")
    assert [task.title for task in config.eval.tasks] == ["gsm8k", "m", "reasoning_gym_chain_sum"]
    config, _ = load(
        tmp_path, "  - gsm8k\n", "eval.tasks.0.limit=5", "eval.tasks.0.path=mine.jsonl", "eval.tasks.0.subset="
    )
    assert (config.eval.tasks[0].limit, config.eval.tasks[0].path, config.eval.tasks[0].subset) == (
        5,
        "mine.jsonl",
        None,
    )


def test_the_list_in_the_guide_is_valid(tmp_path):
    (block,) = (block for block in guide.parse(ROOT / "docs" / "evaluation.md").blocks if block.language == "text")
    config, _ = load(tmp_path, block.text.removeprefix("eval:\n  tasks:\n"))
    assert [task.title for task in config.eval.tasks][-2:] == ["reasoning_gym_chain_sum", "capitals"]


@pytest.mark.parametrize("name", [name for name in shipped_tasks() if name != "own_text"])
def test_every_shipped_task_reads_records_of_its_form(name, tmp_path):
    if name.startswith("math"):
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    options = yaml.load(TaskConfig.shipped(name), yaml.BaseLoader).get("options")
    record = HUB.get(name) or ALPACA | {
        "answer": [options[-1]] if name == "arithmetic/aqua" else (options or [3.0])[-1]
    }
    (tmp_path / "test.json").write_text(json.dumps([record]))
    given = [f"eval.tasks.0.path={tmp_path}/test.json", "eval.tasks.0.subset="]
    config, _ = load(tmp_path, f"  - {name}\n", *given)
    (question,) = questions(config.eval.tasks[0], "eval.tasks.0")
    expected = options[-1] if options else r"It is $\boxed{3}$." if name.startswith("math") else "3"
    assert question.expected in ((expected,), (f"{expected}.0",))
    if name not in HUB:
        assert question.prompt.pieces[0][0].startswith("Below is an instruction that describes a task.")


def test_the_base_models_own_text_needs_no_records(tmp_path):
    (task,) = load(tmp_path, "  - own_text\n")[0].eval.tasks
    assert (task.kind, task.size, task.path) == ("own_text", 64, None)
    with pytest.raises(UserError, match="is not used with kind=own_text: the base model writes the texts"):
        load(tmp_path, "  - own_text\n", "eval.tasks.0.path=records.jsonl")
    for override in ("eval.tasks.0.format=alpaca", "eval.tasks.0.fields={prompt: q}"):
        with pytest.raises(UserError, match="is only used with path; leave it out"):
            load(tmp_path, "  - own_text\n", override)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("  - gsm9k\n", "c.yaml:7: eval.tasks.0: gsm9k: no task of this name is shipped; did you mean gsm8k?"),
        ("  - ''\n", "c.yaml:7: eval.tasks.0: : no task of this name is shipped; there are arithmetic/addsub, "),
        ("  - ../finetune\n", "no task of this name is shipped"),
        ("  - [gsm8k]\n", "eval.tasks.0 must hold settings, one name: value a line"),
        ("  - {task: gsm8k, lmit: 3}\n", "unknown key 'eval.tasks.0.lmit'"),
        ("  - gsm8k\n  - gsm8k\n", "eval.tasks.1.name: gsm8k is also the name of eval.tasks.0; give one of them another"),
        ("  - {path: t.jsonl, scorer: exact}\n", "eval.tasks.0.name: must be given: results are kept under it"),
        ("  - {name: ../t, path: t.jsonl, scorer: exact}\n", "eval.tasks.0.name: is not of a form"),
        ("  - {name: t, path: t.jsonl}\n", "eval.tasks.0.scorer: must be given, one of last_number, option,"),
        ("  - {name: t, path: t.jsonl, scorer: exakt}\n", "eval.tasks.0.scorer: must be one of .* \\(did you mean exact\\?\\)"),
        ("  - {name: t, scorer: exact}\n", "eval.tasks.0.path: must be given, or generator"),
        ("  - {name: t, path: t, generator: chain_sum}\n", "eval.tasks.0.path: is given, and generator, too; leave one"),
        ("  - {name: t, path: t, scorer: reasoning_gym}\n", "eval.tasks.0.scorer: needs the question's own generator"),
        ("  - {name: t, path: t, scorer: option}\n", "eval.tasks.0.options: must be given with scorer=option"),
        ("  - {name: t, path: t, scorer: regex}\n", "eval.tasks.0.pattern: must be given with scorer=regex"),
        ("  - {name: t, path: t, scorer: regex, pattern: x}\n", "eval.tasks.0.pattern: has no group"),
        ("  - {name: t, path: t, scorer: regex, pattern: '(x'}\n", "eval.tasks.0.pattern: is no regular expression: missing"),
        ("  - {name: t, path: t, scorer: exact, pattern: (x)}\n", "pattern: is only used with scorer=regex; leave it out"),
        ("  - {name: t, path: t, scorer: exact, tolerance: 1}\n", "tolerance: is only used with scorer=last_number; leave it"),
        ("  - {name: t, path: t, scorer: exact, options: [a]}\n", "options: is only used with options to choose from; leave"),
        ("  - {name: t, path: t, scorer: exact, seed: 1}\n", "seed: is only used with a generator; leave it out"),
        ("  - {name: t, generator: chain_sum, split: train}\n", "split: is only used with path; leave it out"),
        ("  - {name: t, path: t, scorer: exact, top_p: 0.5}\n", "top_p: is only used in sampling: set temperature, or leave it"),
        ("  - {name: t, path: t, scorer: exact, num_beams: 4}\n", "num_beams: must be 1, got 4: there is no beam search"),
        ("  - {name: t, path: t, kind: perplexity, scorer: exact}\n", "scorer: is only used with kind=generation; leave it out"),
        ("  - {name: t, path: t, kind: multiple_choice}\n", "options: or options_field must be given with kind=multiple_choice"),
        ("  - {name: t, path: t, scorer: exact, prompt_template: '{q}'}\n", "expected: must be given with prompt_template"),
        (
            "  - {name: t, path: t, scorer: exact, prompt_template: '{q}', expected: a, format: alpaca}\n",
            "format: is only used without prompt_template; leave it out",
        ),
    ],
)  # fmt: skip
def test_tasks_that_make_no_sense_are_refused(tasks, expected, tmp_path):
    assert_matches(expected, problem(tmp_path, tasks))


def test_a_list_on_the_command_line_is_not_said_to_stand_in_the_file(tmp_path):
    found = problem(tmp_path, GIVEN + "  - gsm8k\n", "eval.tasks=[gsm8k, {task: gsm8k, name: b, limit: 0}]")
    assert_matches("^override .*: eval.tasks.1.limit: must be at least 1", found)
    found = problem(tmp_path, GIVEN, "eval.tasks=[{path: t, scorer: exact}]")
    assert_matches("c.yaml: eval.tasks.0.name: must be given", found)


def test_names_cannot_be_overridden_where_their_settings_are_in_place(tmp_path):
    found = problem(tmp_path, "  - gsm8k\n", "eval.tasks.0.task=math")
    assert_matches(r"its settings are in place already; give all entries: eval.tasks=\[math\]", found)


@pytest.mark.parametrize(
    ("library", "tasks"), [("math_verify", "  - math\n"), ("reasoning_gym", "  - reasoning_gym/chain_sum\n")]
)
def test_a_library_that_is_not_installed_is_named(library, tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    found = problem(tmp_path, tasks)
    assert f"needs the library {library.replace('_', '-')}: pip install 'liftdist[eval]'" in found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["eval.server_model=m"], "eval.server_model: is only used with eval.server; leave it out"),
        (
            ["eval.server=localhost:8000"],
            "eval.server: is not of a form that this setting takes.*http://localhost:8000/v1",
        ),
        (
            ["eval.server=http://localhost:8000/v1", "eval.tasks=[gsm8k, own_text]"],
            "eval.tasks.1.kind: own_text needs the base model, too",
        ),
    ],
)
def test_servers_that_cannot_be_asked_are_refused(overrides, expected, tmp_path):
    assert_matches(expected, problem(tmp_path, GIVEN, *overrides))


def assert_matches(pattern, text):
    assert re.search(pattern, text), text
