"""A server's answers are those of the model that it holds, and a server that holds another is refused."""

import dataclasses
import json
import shutil
import socket
import time
from contextlib import contextmanager

import builders
import commands
import pytest
import ranks
import served
import vllm_servers

from liftdist import config as configs
from liftdist.console import Console
from liftdist.errors import Stopped, UserError
from liftdist.evaluation import server
from liftdist.evaluation.evaluate import evaluate
from liftdist.evaluation_settings import EvalConfig, TaskConfig
from liftdist.options import Harness
from liftdist.runs import results
from liftdist.runs.context import RunContext

WORDS = ["red", "a much longer green answer", "blue", "seven"]
KINDS = ("said", "chosen", "likely")
TASK = TaskConfig(name="t", scorer="exact", max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("server")
    builders.write_records(made / "records.jsonl")
    lines = [
        {"prompt": "Say something " + "really " * (n % 5) + str(n), "completion": WORDS[n % 4], "options": WORDS}
        for n in range(11)
    ]
    (made / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def with_defaults(target, model, **defaults):
    """A copy of a model that says how it likes to be asked."""
    shutil.copytree(model, target)
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    return target


def asked(folder):
    of = dict(path=str(folder / "questions.jsonl"))
    said = dict(name="said", scorer="contains", max_new_tokens=12)
    chosen = dict(name="chosen", kind="multiple_choice", options_field="options")
    return [task | of for task in (said, chosen, dict(name="likely", kind="perplexity"))]


def config_of(tmp_path, folder, model, **sections):
    return commands.write_config(tmp_path, model, folder / "records.jsonl", eval=dict(tasks=asked(folder)), **sections)


def answers(run_dir, step):
    return {name: results.read_answers(run_dir, name, step) for name in KINDS}


def assert_same(found, expected):
    """Answers to the letter, likelihoods up to what batches change."""
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, score=other.score) == other
        assert one.score == pytest.approx(other.score, rel=1e-4)


def trained(mesh, path):
    config, text = configs.load(path)
    return builders.run_once(mesh, config, text)


def evaluated(mesh, path, *overrides, harness=None):
    """What asking ends with."""
    config, text = configs.load(path, overrides)
    try:
        evaluate(RunContext(config, mesh, Console(False)), text, harness)
        return ""
    except UserError as error:
        return str(error)


def test_a_server_of_the_export_gives_the_answers_of_the_run(folder, tiny_model, tmp_path):
    """Though its generation_config.json says otherwise."""
    model = with_defaults(tmp_path / "model", tiny_model, repetition_penalty=3.0, top_k=1)
    path = config_of(
        tmp_path, folder, model, data=dict(eval_path=None), optimizer=dict(lr=0.1), train=dict(steps=2, eval_interval=0)
    )
    assert ranks.run(1, trained, path) == ["finished"]
    run_dir = tmp_path / "run"
    expected, figures = answers(run_dir, 2), results.read(run_dir)
    assert answers(run_dir, 0) != expected
    for name in KINDS:
        (run_dir / "eval" / name / "step-00000002.jsonl").unlink()
    (run_dir / "eval.jsonl").unlink()
    with served.serving(run_dir / "export") as (url, requests):
        run = commands.run_command("eval", path, f"eval.server={url}", "mesh.dp_replicate=2")
    assert run.returncode == 0, run.stdout
    assert len(requests) == 11 + 11 * 4 + 11
    assert "said/accuracy" in run.stdout
    for name, found in answers(run_dir, 2).items():
        assert_same(found, expected[name])
    again = {(figure.task, figure.metric): figure.value for figure in results.read(run_dir)}
    assert ("said", "accuracy_change") in again
    assert again == pytest.approx({(one.task, one.metric): one.value for one in figures if one.step == 2}, rel=1e-4)
    with served.serving(model) as (url, requests):
        problem = f"serves {model}, whose weights are not those of {run_dir}/export; start vllm serve {run_dir}/export"
        assert problem in ranks.run(1, evaluated, path, f"eval.server={url}")[0]
    (run_dir / "export").rename(run_dir / "moved")
    with served.serving(run_dir / "moved") as (url, requests):
        assert (
            "export: is not the model of step 2, the newest" in ranks.run(1, evaluated, path, f"eval.server={url}")[0]
        )
    assert not requests


def refusals(mesh, path, *cases):
    found = [evaluated(mesh, path, *overrides) for overrides in cases]
    return [*found, evaluated(mesh, path, *cases[0], harness=Harness(["gsm8k"], None, None, None, False))]


def test_what_cannot_be_asked_is_refused_and_nothing_is_written(folder, tiny_model, tmp_path):
    path = config_of(tmp_path, folder, tiny_model)
    with (
        served.serving(tiny_model, max_model_len=16) as (small, unused),
        served.serving(tiny_model, dies_after=3) as (dies, _),
    ):
        cases = [[f"eval.server={small}"], [f"eval.server={dies}"]]
        room, death, harness = ranks.run(1, refusals, path, *cases)[0]
    assert "tokens, the server takes 16 (its --max-model-len); lower" in room
    assert "--harness: asks a model folder itself; leave out eval.server" in harness
    assert not unused
    assert f"{dies}/completions: no answer" in death
    assert not list((tmp_path / "run").glob("eval.jsonl"))
    assert [file.name for file in (tmp_path / "run").rglob("*") if file.is_file()] == ["base.json"]
    first, _ = ranks.run(2, evaluated, path, "eval.server=http://localhost:1/v1")
    assert first == "eval.server: is asked by one rank, not by 2; leave out --nproc and --nnodes"
    assert "eval.server: is for `liftdist eval`" in commands.liftdist("train", path, f"eval.server={small}", code=2)


@contextmanager
def connected(model, *, name=None, **how):
    with served.serving(model, **how) as (url, requests):
        yield server.connect(EvalConfig(server=url, server_model=name)), requests


PROMPTS = [[1, 17, 900 + number] for number in range(4)]


def test_samples_are_those_of_their_seed(tiny_model):
    sampled = dataclasses.replace(TASK, temperature=1.0, top_p=0.9)
    with connected(tiny_model) as (held, requests):
        first, again, other = (held.answer(PROMPTS, sampled, [2], seed, lambda: None) for seed in (5, 5, 6))
    assert first == again != other
    assert sorted(request["seed"] for request in requests[:4]) == [5, 6, 7, 8]
    assert {request["top_p"] for request in requests} == {0.9}


def test_answers_end_where_they_are_told_to(tiny_model, tmp_path):
    with connected(tiny_model) as (held, _):
        (plain,) = held.answer(PROMPTS[:1], TASK, [2], 0, lambda: None)
        assert held.answer(PROMPTS[:1], TASK, [2, plain[2]], 0, lambda: None) == [plain[: plain.index(plain[2])]]
    short = with_defaults(tmp_path / "short", tiny_model, max_new_tokens=2)
    with (
        connected(short) as (held, _),
        pytest.raises(UserError, match="after 2 of 5 tokens .length.*--generation-config vllm"),
    ):
        held.answer(PROMPTS, TASK, [2], 0, lambda: None)


@pytest.mark.parametrize(
    ("how", "name", "problem"),
    [
        (
            dict(besides=["b"]),
            None,
            "eval.server_model: must be given where several models are served; there are: a, b",
        ),
        ({}, "c", "eval.server_model c: no model of this name is served; there are: a"),
        (dict(parent="x"), None, "eval.server_model a: is an adapter of x"),
        (dict(max_model_len=None), None, "does not say max_model_len of a, as vLLM does"),
        (dict(key="secret"), None, "401 Unauthorized.*; set VLLM_API_KEY"),
    ],
)
def test_another_server_is_refused(how, name, problem, tiny_model):
    with pytest.raises(UserError, match=problem), connected(tiny_model, name=name, id="a", **how):
        pass


def test_a_key_is_sent(tiny_model, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with connected(tiny_model, key="secret") as (held, _):
        assert len(held.answer(PROMPTS, TASK, [2], 0, lambda: None)) == 4


def test_a_server_that_is_none_of_vllm_is_refused(tiny_model):
    with connected(tiny_model, lacks=["token_ids", "prompt_logprobs"]) as (held, _):
        with pytest.raises(UserError, match="gives no token_ids; eval.server takes vLLM"):
            held.answer(PROMPTS, TASK, [2], 0, lambda: None)
        with pytest.raises(UserError, match="gives no prompt_logprobs"):
            held.log_likelihoods([([1], [2])], lambda: None)
    with pytest.raises(UserError, match="models: no answer: .*refused.*; is the server running?"):
        server.connect(EvalConfig(server="http://127.0.0.1:1/v1"))
    with (
        served.serving(tiny_model) as (url, _),
        pytest.raises(UserError, match="404 .*eval.server is the address of the API"),
    ):
        server.connect(EvalConfig(server=url.removesuffix("/v1")))


def test_a_model_that_is_not_here_must_be_named(tiny_model, tmp_path):
    for root, name, note in (
        (None, "some/model", None),
        ("some/model", "some/model", None),
        ("/else/where", "m", None),
    ):
        with connected(tiny_model, id="m", root=root) as (held, _):
            if root == name:
                assert held.check(name, tiny_model, tmp_path) is note
                continue
            with pytest.raises(UserError, match="no folder here.*if it is the same, say so: eval.server_model=m"):
                held.check(name, tiny_model, tmp_path)
        with connected(tiny_model, id="m", root=root, name="m") as (held, _):
            assert "is not checked" in held.check(name, tiny_model, tmp_path)


def test_a_request_to_stop_does_not_wait_for_answers():
    def beat():
        if time.monotonic() > begin + 1:
            raise Stopped("SIGTERM")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        held = server.Server(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", "m", 512, False)
        begin = time.monotonic()
        with pytest.raises(Stopped):
            held.answer(PROMPTS, TASK, [2], 0, beat)
        assert time.monotonic() < begin + 30


@pytest.mark.slow
def test_vllm_gives_the_answers_of_transformers(folder, smollm2, tmp_path):
    model = with_defaults(tmp_path / "model", smollm2, repetition_penalty=3.0, top_k=1, temperature=0.7)
    path = config_of(tmp_path, folder, model)
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
    with vllm_servers.started([vllm_servers.command(), "serve", model, *options], tmp_path / "log") as (url, _):
        assert ranks.run(1, evaluated, path, f"eval.server={url}/v1", f"run_dir={tmp_path}/served", timeout=600) == [""]
    assert ranks.run(1, evaluated, path) == [""]
    served_, own = answers(tmp_path / "served", 0), answers(tmp_path / "run", 0)
    same = sum(one.answer == other.answer for one, other in zip(served_["said"], own["said"], strict=True))
    assert same >= 10  # of 11: two tokens may be equally likely
    assert len({one.answer for one in own["said"]}) > 5
    for name in ("chosen", "likely"):
        assert_same(served_[name], own[name])
