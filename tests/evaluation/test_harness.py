"""Tasks of the lm-evaluation-harness, on local data: what the harness finds by itself."""

import json
import shutil
from pathlib import Path

import builders
import commands
import pytest
import ranks
import yaml
from safetensors.torch import load_file, save_file

from liftdist.console import Console
from liftdist.deltas import export, of_run
from liftdist.engine.quantisation import Format
from liftdist.errors import UserError
from liftdist.evaluation.evaluate import evaluate
from liftdist.evaluation_settings import TaskConfig
from liftdist.options import Harness
from liftdist.runs import results
from liftdist.runs.context import RunContext

lm_eval = pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: pip install 'liftdist[harness]'")
from liftdist.evaluation import harness  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of sums: the harness's own GSM8K, asked without examples, and of both kinds of multiple choice."""
    made = tmp_path_factory.mktemp("harness")
    sums = [(a, b) for a in (2, 3, 10, 25) for b in (1, 4, 5)]
    questions = [
        {
            "question": f"Tom has {a} apples and gets {b} more. How many apples does he have?",
            "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
            "options": [str(a + b), f"{a} and {b}", "seven"],
            "number": 0,
            "ways": [f"{a} and {b}", f"{b} and {a}"],
        }
        for a, b in sums
    ]
    (made / "sums.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    own = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    data = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(made / "sums.jsonl"))))
    data |= dict(test_split="test", dataset_name=None, training_split=None, fewshot_split="test", tag=None)
    said = own | data | dict(task="said", num_fewshot=None)
    said["generation_kwargs"] |= dict(max_gen_toks=16)
    question = "Question: {{question}}\nAnswer:"
    chosen = dict(task="chosen", output_type="multiple_choice", doc_to_text=question, doc_to_choice="options")
    chosen |= dict(doc_to_target="number", num_fewshot=0)
    chosen |= dict(metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    ways = dict(task="ways", output_type="multiple_choice", doc_to_text="number", doc_to_choice="ways")
    ways |= dict(doc_to_target=" apples", metric_list=[dict(metric="acc")])
    absent = chosen | dict(task="absent") | data | dict(dataset_kwargs=dict(data_files=dict(test="absent.jsonl")))
    remote = chosen | data | dict(task="remote", dataset_path="someone/something", dataset_kwargs=None)
    (made / "tasks").mkdir()
    for task in (said, data | chosen, data | ways, absent, remote):
        kept = {key: value for key, value in task.items() if value is not None}
        (made / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    return made


def asked(folder, *names, limit=None, fewshot=None, chat=False):
    return Harness(names, Path(folder) / "tasks", limit, fewshot, chat)


def settings_of(folder, model):
    builders.write_records(Path(folder) / "records.jsonl")
    made = builders.config(model, Path(folder) / "records.jsonl", Path(folder), train=dict(steps=2))
    made.optimizer.lr = 0.1
    return made


def asked_twice(mesh, folder, model):
    """A run after its last step, and the model as it is, by the chat template after two examples."""
    settings = settings_of(folder, model)
    context = RunContext(settings, mesh, Console(False))
    evaluate(context, "{}", asked(folder, "said", "chosen", limit=8))
    for path in Path(settings.run_dir).glob("eval/*/*.jsonl") if mesh.is_main else ():  # or else nothing may change
        first, *others = map(json.loads, path.read_text().splitlines())
        first["score"] = 1 - first["score"]
        path.write_text("".join(json.dumps(answer) + "\n" for answer in (first, *others)))
    builders.train_and_save(mesh, settings)
    evaluate(context, "{}", asked(folder, "said", "chosen", "ways"))
    settings.run_dir = f"{folder}/as-it-is"
    evaluate(context, "{}", asked(folder, "said", limit=5, fewshot=2, chat=True))
    settings.run_dir, settings.model.base_dtype = f"{folder}/rounded", "nf4"
    evaluate(context, "{}", asked(folder, "said", limit=5))


@pytest.fixture(scope="module")
def was_asked(folder, tiny_model):
    ranks.run(3, asked_twice, folder, tiny_model)


def alone(folder, model, *names, **options):
    """What the harness finds by itself."""
    manager = lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    arguments = dict(pretrained=str(model), dtype="float32", device="cpu")
    return lm_eval.simple_evaluate("hf", arguments, list(names), batch_size=16, task_manager=manager, **options)


def replies(found):
    return [one["resps"][0][0] for one in found["samples"]["said"] if one["filter"] == "flexible-extract"]


@pytest.mark.usefixtures("was_asked")
def test_a_run_is_asked_as_the_harness_asks_its_export(folder, tiny_model):
    run_dir, exported = folder / "run", folder / "export"
    assert not list(run_dir.glob(".*"))
    export.export(*of_run.of_run_dir(run_dir, None, None)[:2], exported, "hf", folder / "cache")
    expected = alone(folder, exported, "said", "chosen", "ways")
    figures = {(figure.task, figure.metric): figure for figure in results.read(run_dir)}
    found = 0
    for task, values in expected["results"].items():
        for key in (key for key in values if "," in key and "_stderr" not in key):
            metric, _, filtered = key.partition(",")
            title = f"harness.{task}.{metric}" + (f".{filtered}" if filtered != "none" else "")
            figure, answers = figures[title, metric], results.read_answers(run_dir, title, 2)
            assert figure.value == values[key]
            assert (figure.step, figure.questions) == (2, 12)
            assert 0 <= figure.low <= figure.value <= figure.high <= 1
            samples = [one for one in expected["samples"][task] if one["filter"] == filtered]
            assert [answer.score for answer in answers] == [one[metric] for one in samples]
            assert [answer.id for answer in answers] == list(range(12))
            if task == "said":
                assert [answer.answer for answer in answers] == [one["resps"][0][0] for one in samples]
                assert [answer.extracted for answer in answers] == [one["filtered_resps"][0] for one in samples]
            else:
                assert all(answer.score == (answer.answer in answer.expected) for answer in answers)
            found += 1
    assert found == 5 == sum(not metric.endswith(results.CHANGE) for _, metric in figures)
    assert replies(expected) != replies(alone(folder, tiny_model, "said"))


@pytest.mark.usefixtures("was_asked")
def test_scores_have_a_change_since_the_base_model(folder):
    """By the questions that it was asked, eight of twelve; of a task that it was not asked there is none."""
    run_dir = folder / "run"
    changes = {one.task: one for one in results.read(run_dir) if one.metric.endswith(results.CHANGE)}
    assert set(changes) == set(results.tasks(run_dir)) - {"harness.ways.acc"}
    assert len(changes) == 4
    for task, change in changes.items():
        before, after = (results.read_answers(run_dir, task, step)[:8] for step in (0, 2))
        assert [answer.prompt for answer in before] == [answer.prompt for answer in after]
        expected = sum(b.score - a.score for a, b in zip(before, after, strict=True)) / 8
        assert (change.step, change.questions, change.value) == (2, 8, pytest.approx(expected))
        assert change.low <= change.value <= change.high
        assert 0 < change.p <= 1
    assert any(change.value for change in changes.values())


@pytest.mark.usefixtures("was_asked")
def test_examples_and_the_chat_template_are_those_of_the_harness(folder, tiny_model):
    worded = dict(num_fewshot=2, limit=5, apply_chat_template=True, fewshot_as_multiturn=True)
    expected = alone(folder, tiny_model, "said", **worded)
    samples = [one for one in expected["samples"]["said"] if one["filter"] == "strict-match"]
    answers = results.read_answers(folder / "as-it-is", "harness.said.exact_match.strict-match", 0)
    assert [answer.prompt for answer in answers] == [one["arguments"][0][0] for one in samples]
    assert [answer.answer for answer in answers] == replies(expected)
    assert len(answers) == 5
    assert answers[0].prompt.count("<|im_start|>assistant") == 3


@pytest.mark.usefixtures("was_asked")
def test_a_model_is_asked_as_it_is_rounded(folder, tiny_model, tmp_path):
    rounded = shutil.copytree(tiny_model, tmp_path / "rounded")
    tensors = load_file(rounded / "model.safetensors")
    for name, weights in tensors.items():
        if "_proj" in name:
            tensors[name] = Format("nf4", weights.shape[1]).rounded(weights)
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    answers = results.read_answers(folder / "rounded", "harness.said.exact_match.strict-match", 0)
    expected, other = (replies(alone(folder, path, "said", limit=5)) for path in (rounded, tiny_model))
    assert [answer.answer for answer in answers] == expected
    assert expected != other


def asked_by_both(mesh, folder, run_dir, model):
    settings = settings_of(folder, model)
    settings.run_dir = run_dir
    own = dict(name="own", path=f"{folder}/sums.jsonl", prompt_template="Question: {question}\nAnswer:")
    own |= dict(expected="answer", scorer="last_number", max_new_tokens=16, limit=6)
    settings.eval.tasks = [TaskConfig(**own)]
    context = RunContext(settings, mesh, Console(False))
    evaluate(context, "{}")
    evaluate(context, "{}", asked(folder, "said", limit=6))


def test_the_harness_and_the_task_of_this_project_score_alike(folder, smollm2, tmp_path):
    run_dir, title = tmp_path / "run", "harness.said.exact_match.flexible-extract"
    ranks.run(1, asked_by_both, folder, str(run_dir), smollm2)
    mine, theirs = (results.read_answers(run_dir, task, 0) for task in ("own", title))
    assert [answer.prompt for answer in mine] == [answer.prompt for answer in theirs]
    assert [answer.answer.strip() for answer in mine] == [answer.answer.strip() for answer in theirs]
    assert [answer.score for answer in mine] == [answer.score for answer in theirs]
    figures = {figure.task: figure for figure in results.read(run_dir)}
    assert (figures["own"].value, figures["own"].low) == (figures[title].value, figures[title].low)
    assert 0 < figures["own"].value < 1
    assert list((run_dir / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("absent", {}, "--harness absent: the task or its data set cannot be loaded: .*absent.jsonl"),
        (
            "remote",
            {},
            "--harness remote: .*; the hub cannot be reached .HF_HUB_OFFLINE or .* and its cache lacks the data",
        ),
    ],
)
def test_data_that_cannot_be_had_is_refused(name, options, problem, folder):
    with pytest.raises(UserError, match=problem):
        harness.load(asked(folder, name, **options))


@pytest.mark.slow
def test_the_command_hands_its_flags_to_the_ranks(folder, tiny_model, tmp_path):
    config = commands.write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    flags = ["--harness", "said,ways", "--harness-path", folder / "tasks", "--harness-limit", 6, "--harness-chat"]
    run = commands.run_command("eval", config, *flags, "--nproc", 2)
    assert run.returncode == 0, run.stdout
    assert "harness.said.exact_match.flexible-extract/exact_match  0." in run.stdout
    answers = results.read_answers(tmp_path / "run", "harness.ways.acc", 0)
    assert len(answers) == 6
    assert answers[0].prompt.startswith("<|im_start|>")


@pytest.mark.slow
def test_tasks_of_the_harness(folder, tiny_model):
    """By name, beside one's own, and in a group. Reads all of its task files, which takes half a minute."""
    group = dict(group="both", task=["chosen", "ways"], aggregate_metric_list=[dict(metric="acc", weight_by_size=True)])
    (folder / "tasks" / "both.yaml").write_text(yaml.safe_dump(group, sort_keys=False))
    for name, problem in (
        ("gsm8q", "--harness gsm8q: the harness has no such task; did you mean gsm8k[?]"),
        ("gsm8k", "--harness gsm8k: .*; the hub cannot be reached"),
    ):
        with pytest.raises(UserError, match=problem):
            harness.load(asked(folder, "said", name))
    ranks.run(2, asked_of_group, folder, tiny_model)
    figures = {figure.task: figure for figure in results.read(folder / "group")}
    parts = [figures[f"harness.{name}.acc"] for name in ("chosen", "ways")]
    whole = figures["harness.both.acc"]
    assert whole.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert (whole.questions, parts[0].questions) == (24, 12)
    assert whole.low < whole.value < whole.high
    assert not (folder / "group/eval/harness.both.acc").exists()


def asked_of_group(mesh, folder, model):
    settings = settings_of(folder, model)
    settings.run_dir = f"{folder}/group"
    evaluate(RunContext(settings, mesh, Console(False)), "{}", asked(folder, "both"))
