"""A greedy soup of deltas: by tasks that a real model answers, one that harms is left out."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import builders
import commands
import pytest
import torch
import torch.nn.functional as F
from commands import liftdist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftdist.deltas import file as delta_file
from liftdist.deltas import merge
from liftdist.evaluation import candidates, soup
from liftdist.models.weights import ModelFolder

REPLIES = ["red", "green and blue", "seven", "a word"]


def nats_of_replies(model, tokenizer):
    """Nats of all replies, as the task has them."""
    total = torch.zeros(())
    for number, reply in enumerate(REPLIES):
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"Say {number}: ", reply))
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + F.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum")
    return total


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A base model, and what steps of some of its weights make of it: towards the replies of a task, or away from them."""
    folder = tmp_path_factory.mktemp("soup")
    base = builders.llama(folder / "base", tiny_model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    nats_of_replies(model, tokenizer).backward()
    tensors = load_file(base / "model.safetensors")
    for name, step, part in (("harms", 0.02, 0), ("good", -0.004, 1), ("better", -0.004, None), ("other", -0.004, 2)):
        changed = {}
        for key, tensor in tensors.items():
            gradient = model.get_parameter(key).grad.flatten() if "_proj" in key else torch.zeros(tensor.numel())
            chosen = (
                torch.arange(len(gradient)) % 3 == part
                if part is not None
                else gradient.abs() > gradient.abs().median()
            )
            changed[key] = tensor + (step * gradient.sign() * chosen).view(tensor.shape)
        shutil.copytree(base, folder / f"{name}-model")
        save_file(changed, folder / f"{name}-model" / "model.safetensors", {"format": "pt"})
        liftdist("diff", base, folder / f"{name}-model", "--output", folder / name, "--cache-dir", folder / "cache")
    records = [{"prompt": f"Say {number}: ", "completion": reply} for number, reply in enumerate(REPLIES)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = dict(name="replies", kind="perplexity", path=str(folder / "questions.jsonl"))
    builders.write_records(folder / "records.jsonl")
    commands.write_config(folder, base, folder / "records.jsonl", eval=dict(tasks=[task]))
    return folder


def test_those_are_chosen_that_a_plain_loop_chooses(made):
    base = ModelFolder(made / "base")
    deltas = [delta_file.read(made / name) for name in ("harms", "good", "other", "better")]
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def score(changes):
        model.load_state_dict({name: tensor + changes.get(name, 0) for name, tensor in before.items()})
        return -nats_of_replies(model, tokenizer).item()

    def dense(delta):
        found = {}
        for name in delta.names:
            change = delta.get(name)
            found[name] = torch.zeros(change.shape)
            found[name].view(-1)[change.indices] = change.values - change.base
        return found

    one = [dense(delta) for delta in deltas]

    def mean(places):
        return {name: sum(one[place].get(name, 0) for place in places) / len(places) for name in before}

    order = sorted(range(4), key=lambda place: -score(one[place]))
    expected, best = order[:1], score(one[order[0]])
    for place in order[1:]:
        if (found := score(mean([*expected, place]))) >= best:
            expected, best = [*expected, place], found
    assert 0 not in expected  # the one that harms
    said = []
    found = soup.greedy(
        deltas, base, lambda delta: score(dense(delta) if delta else {}), ["t"], made / "out", said.append
    )
    assert [part["name"] for part in found.made["deltas"]] == [
        deltas[place].location.name for place in sorted(expected)
    ]
    assert found.made["score"] == pytest.approx(best, rel=1e-5)
    assert "left out: harms" in said
    plain = merge.merged([deltas[place] for place in sorted(expected)], "mean", {}, made / "out")
    for name in plain.names:
        assert torch.equal(found.get(name).values, plain.get(name).values)
    nothing = soup.greedy(deltas[:1], base, lambda delta: -1.0 if delta else 0.0, ["t"], made / "out", said.append)
    assert nothing.made["score_of_base"] == 0
    assert said[-1] == "the base model scores higher than what is written"
    with pytest.raises(soup.UserError, match="no delta has a score"):
        soup.greedy(deltas, base, lambda delta: math.nan, ["t"], made / "out", said.append)


def perplexity(made, folder):
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    with torch.no_grad():
        nats = nats_of_replies(AutoModelForCausalLM.from_pretrained(made / folder), tokenizer).item()
    return math.exp(nats / sum(len(tokenizer(reply, add_special_tokens=False)["input_ids"]) for reply in REPLIES))


def test_a_candidate_is_asked_as_the_model_that_it_makes(made, tmp_path):
    config = made / "revision.yaml"
    config.write_text((made / "config.yaml").read_text().replace("model:\n", "model:\n  revision: main\n"))
    ask = candidates.by_eval(
        *candidates.settings(config), made / "base", tmp_path / "out"
    )  # a folder, which has no revisions
    assert ask(delta_file.read(made / "better")) == pytest.approx(-perplexity(made, "better-model"), rel=1e-3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_asks_its_tasks_and_leaves_out_what_harms(made, tmp_path):
    words = ("merge", made / "harms", made / "better", "--rule", "greedy", "--eval", made / "config.yaml")
    said = liftdist(*words, "--output", tmp_path / "out", "--cache-dir", made / "cache")
    assert "left out: harms" in said
    scores = {what: float(number) for number, what in re.findall(r"^ *(-?\d+\.\d{4})  (.*)$", said, re.MULTILINE)}
    assert scores.keys() == {"the base model", "harms", "better", "harms + better"}
    for name, folder in (("the base model", "base"), ("harms", "harms-model"), ("better", "better-model")):
        assert scores[name] == pytest.approx(-perplexity(made, folder), rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    one, other = delta_file.read(tmp_path / "out"), delta_file.read(made / "better")
    assert (one.made["merge"], one.made["tasks"], one.base_digest) == ("greedy", ["replies"], other.base_digest)
    assert all(torch.equal(one.get(name).values, other.get(name).values) for name in other.names)
    assert "merge greedy" in liftdist("show", tmp_path / "out")


@pytest.mark.slow
def test_a_compressed_delta_is_asked_beside_its_original(made, tmp_path):
    words = ("compress", made / "better", "--method", "t_switch", "--alpha", "0.9", "--eval", made / "config.yaml")
    said = liftdist(*words, "--output", tmp_path / "out", "--cache-dir", made / "cache")
    scores = {what: float(number) for number, what in re.findall(r"^ *(-?\d+\.\d{4})  (.*)$", said, re.MULTILINE)}
    assert list(scores) == ["the base model", "better", "out"]
    liftdist("apply", tmp_path / "out", made / "base", "--output", tmp_path / "applied", "--cache-dir", made / "cache")
    for name, folder in (("the base model", "base"), ("better", "better-model"), ("out", tmp_path / "applied")):
        assert scores[name] == pytest.approx(-perplexity(made, folder), rel=1e-3)
    assert scores["the base model"] < scores["out"] < scores["better"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["applied", "out"]


@pytest.mark.slow
def test_one_that_is_ended_leaves_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(temporary := tmp_path / "temporary"))
    temporary.mkdir()
    words = ("merge", made / "harms", "--rule", "greedy", "--eval", made / "config.yaml", "--output", tmp_path / "out")
    command = [sys.executable, "-m", "liftdist", *map(str, words), "--cache-dir", str(made / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not list(temporary.glob("liftdist-*")) and process.poll() is None:  # of the command that asks
            time.sleep(0.02)
        process.terminate()
        said, _ = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (128 + signal.SIGTERM, "liftdist: ended by SIGTERM")
    assert list(temporary.iterdir()) == []
    assert list(tmp_path.iterdir()) == [temporary]


def test_what_tells_nothing_of_candidates_is_refused(made, tmp_path):
    config = (made / "config.yaml").read_text()
    given, at = ("merge", made / "good", "--output", tmp_path / "out"), ("--cache-dir", made / "cache")
    tasks = {
        "none": [],
        "own": [dict(name="own", kind="own_text")],
        "both": [dict(name="a", kind="perplexity", path="x"), dict(name="b", scorer="contains", path="x")],
    }
    for name, listed in tasks.items():
        path = commands.write_config(tmp_path, made / "base", made / "records.jsonl", eval=dict(tasks=listed))
        path.rename(tmp_path / name)
    (tmp_path / "lost").write_text(config.replace("questions.jsonl", "lost.jsonl"))
    for words, problem in (
        (("--rule", "greedy"), "--rule greedy: needs --eval CONFIG, whose eval.tasks say which deltas help"),
        (("--rule", "greedy", "--eval", tmp_path / "x"), "x: no such config or run directory"),
        (
            ("--rule", "greedy", "--eval", made / "config.yaml", "--weights", "1"),
            "--weights: --rule greedy has no such option",
        ),
        (
            ("--rule", "greedy", "--eval", made / "config.yaml", "--onto", made / "base"),
            "--onto: --rule greedy has no such",
        ),
        (("--rule", "sum", "--eval", made / "config.yaml"), "--eval: --rule sum has no such option"),
        (("--rule", "greedy", "--eval", tmp_path / "none"), "eval.tasks: say what candidates are to be asked"),
        (("--rule", "greedy", "--eval", tmp_path / "own"), "eval.tasks: have no score in common"),
        (("--rule", "greedy", "--eval", tmp_path / "both"), "eval.tasks: have no score in common"),
        (
            ("--rule", "greedy", "--eval", made / "config.yaml", "--base", made / "good-model"),
            "is not the base model of",
        ),
        (("--rule", "greedy", "--eval", tmp_path / "lost"), "lost.jsonl: no such file"),
    ):
        assert problem in liftdist(*given, *words, *at, code=2)
    small = ("compress", made / "good", "--output", tmp_path / "out")
    for words, problem in (
        (("--eval", tmp_path / "x"), "x: no such config or run directory"),
        (("--eval", tmp_path / "own"), "eval.tasks: have no score in common"),
        (("--eval", made / "config.yaml", "--base", made / "good-model"), "is not the base model of"),
    ):
        assert problem in liftdist(*small, *words, *at, code=2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]
