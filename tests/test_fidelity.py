"""``python -m bench fidelity``: its problems, its configs, and its runs, which go on where they were."""

import ast
import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from commands import ROOT, run_command

from bench import fidelity, frontier, problems, trials
from liftdist import config as configs


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems_are_worked_out_and_none_is_in_two_splits(tmp_path):
    sizes = dict(training=60, development=20, test=20)
    problems.write(tmp_path, "sums", dict(terms=4, digits=2), sizes, "alpaca")
    found = {split: records(tmp_path / f"{split}.jsonl") for split in problems.SPLITS}
    assert {split: len(some) for split, some in found.items()} == sizes
    every = [record for some in found.values() for record in some]
    assert len({record["instruction"] for record in every}) == 100
    for record in every:
        *steps, last = record["output"].splitlines()
        said = [step.split(" = ") for step in steps]
        assert all(value(left) == int(right) for left, right in said)
        asked = record["instruction"].removeprefix("What is ").removesuffix("?")
        assert str(value(asked)) == said[-1][1] == record["answer"] == last.removeprefix("The answer is ")
    before = (tmp_path / "test.jsonl").read_text()
    problems.write(tmp_path, "sums", dict(terms=4, digits=2), sizes, "alpaca")
    assert (tmp_path / "test.jsonl").read_text() == before
    with pytest.raises(ValueError, match="makes 9 questions where 100 are needed"):
        problems.write(tmp_path, "sums", dict(terms=1, digits=1), sizes, "alpaca")


def test_questions_are_the_same_in_both_formats(tmp_path):
    sizes = dict(training=6, development=2, test=2)
    for form in ("alpaca", "prompt_completion"):
        problems.write(tmp_path / form, "sums", dict(terms=2, digits=2), sizes, form)
        problems.write_known(tmp_path / form, form)
    for name in ("training", "capitals"):
        posed, plain = (records(tmp_path / form / f"{name}.jsonl") for form in ("alpaca", "prompt_completion"))
        assert [(one["instruction"] + "\n", one["output"], one.get("answer")) for one in posed] == [
            (one["prompt"], one["completion"], one.get("answer")) for one in plain
        ]


def value(text):
    """Of a sum, by another way than that of the problems."""
    return eval(compile(ast.parse(text, mode="eval"), "sum", "eval"), {"__builtins__": {}})


@pytest.mark.parametrize("preset", ["cpu", "gpu", "tiny"], ids="preset-{}".format)
def test_every_config_is_one_of_the_product(preset, tmp_path):
    settings, plan, _ = trials.preset(preset, "model")
    settings.rank = 14
    assert len({len(rates) for rates in plan.rates.values()}) == 1  # equally many chances for each method
    planned = list(trials.trials(settings, plan, "development", []))
    found = {}
    for trial in {trial.method: trial for trial in planned}.values():
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(trials.config(trial, settings, tmp_path)))
        config, _ = configs.load(str(path), [])
        assert config.unused() == {}
        assert (config.optimizer.lr, config.train.seed) == (trial.lr, trial.seed)
        assert config.eval.tasks[0].path.endswith(f"{trial.task}/development.jsonl")
        found[trial.method] = config.train
    assert set(found) == set(plan.methods)
    assert all(train == found["lift"] for train in found.values())  # batches are the same
    assert len(planned) == len(settings.tasks) * sum(len(plan.rates[method]) for method in plan.methods)


def test_rates_are_tested_on_other_runs_than_those_that_chose_them():
    settings, plan, _ = trials.preset("tiny", "model")
    settings.tasks = settings.tasks[:1]
    scores = {("lift", 1e-3): "1000", ("lift", 2e-3): "1100", ("full", 1e-4): "1110", ("full", 2e-4): "1111"}
    done = [
        dict(
            task="sums", method=method, lr=lr, seed=0, stage="development", status="finished", scores=right,
            base_scores="0000", forgotten=dict(own_text=1.0 if lr == 2e-4 else 0.1),
        )
        for (method, lr), right in scores.items()
    ]  # fmt: skip
    planned = list(trials.trials(settings, plan, "test", done))
    assert {(trial.method, trial.lr) for trial in planned} == {("lift", 2e-3), ("full", 1e-4)}  # 2e-4 forgets too much
    assert [(trial.method, trial.seed) for trial in planned] == [("lift", 1), ("full", 1), ("lift", 2), ("full", 2)]


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    settings, *_ = trials.preset("tiny", "model")
    fidelity._prepare(tmp_path, settings)
    fidelity._prepare(tmp_path, settings)
    settings.steps = 3
    with pytest.raises(SystemExit, match="other settings \\(steps 2, now 3\\); give another --output"):
        fidelity._prepare(tmp_path, settings)


def test_figures_are_those_of_tasks_and_not_their_changes():
    def curve(**values):
        return SimpleNamespace(steps=np.array([0, 4, 8]), values=np.array(list(values.values())))

    def figures(*values, first=0):
        return [SimpleNamespace(step=step, value=value) for step, value in zip((0, 4, 8)[first:], values, strict=True)]

    answers = {step: {"2": SimpleNamespace(score=1.0), "10": SimpleNamespace(score=0.0)} for step in (0, 4, 8)}
    found = fidelity._found(
        SimpleNamespace(
            seconds=1.0,
            curves={"eval/loss": curve(a=3.0, b=1.0, c=2.0), "train/loss": curve(a=3.0, b=2.0, c=1.0)},
            evaluations={
                ("target", "accuracy"): figures(0.1, 0.5, 0.4),
                ("target", "accuracy_change"): figures(0.4, 0.3, first=1),
                ("prose", "perplexity"): figures(20.0, 40.0, 50.0),
                ("prose", "perplexity_change"): figures(20.0, 30.0, first=1),
                ("own_text", "kl_to_base"): figures(0.0, 0.2, 0.3),
            },
            answers={"target": answers},
        )
    )
    assert found["best_step"] == 4
    assert found["figures"] == {"target": 0.5, "prose": 40.0, "own_text": 0.2}
    assert found["base"] == {"target": 0.1, "prose": 20.0, "own_text": 0.0}
    assert found["forgotten"] == {"own_text": 0.2, "prose": pytest.approx(math.log(2))}
    assert found["scores"] == "10"


@pytest.mark.slow
def test_the_chain_from_runs_to_frontiers_goes_on_where_it_was(tiny_model, tmp_path):
    out, output = tmp_path / "out.json", tmp_path / "output"
    words = ("fidelity", "--preset", "tiny", "--model", tiny_model, "--output", output, "--out", out)
    begun = run_command(*words, "--minutes", "0.001", "--jobs", "1", module="bench")
    assert begun.returncode == 0, begun.stdout
    assert "not begun in time" in begun.stdout
    done = run_command(*words, module="bench", timeout=900)
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())
    assert {(run["stage"], run["status"]) for run in found["runs"]} == {
        ("development", "finished"),
        ("test", "finished"),
    }
    assert len(found["runs"]) == 2 * 2 + 2 * 2
    of_task = found["analysis"]["sums"]
    assert frontier.analyse(found) == found["analysis"]
    assert of_task["seeds"] == [1, 2]
    assert set(of_task["against"]) == {"full"}
    assert out.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    again = run_command(*words, module="bench")
    assert "development: 4 runs, 0 to be run" in again.stdout
    assert "test: 4 runs, 0 to be run" in again.stdout
    assert json.loads(out.read_text()) == found
    assert not list(output.glob("runs/*/checkpoints"))
    elsewhere = run_command(
        *words[:5], "--output", tmp_path / "elsewhere", "--out", tmp_path / "all.json", "--earlier", out, module="bench"
    )
    assert "development: 4 runs, 0 to be run" in elsewhere.stdout
    assert json.loads((tmp_path / "all.json").read_text()) == found
    other = run_command(*words[:5], "--earlier", out, "--set", "steps=3", module="bench")
    assert (other.returncode, "its runs have other settings (steps 2, now 3)" in other.stdout) == (1, True)


@pytest.mark.slow
def test_runs_stop_with_the_command_that_began_them(tiny_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "fidelity",
        "--preset",
        "tiny",
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path),
    ]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out.json")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as bench:
        while not list(tmp_path.glob("runs/*/attempts")):
            assert bench.poll() is None
            time.sleep(0.1)
        bench.terminate()
        said = bench.communicate(timeout=60)[1]
    assert "asked to stop; the same command goes on" in said
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout
