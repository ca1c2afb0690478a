"""A real vLLM server answers for a base model and its deltas as servers of the merged models do, to the last bit."""

import json
import os
import random
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import builders
import pytest
import vllm_servers
from commands import ROOT, liftdist

pytestmark = pytest.mark.slow
QUESTIONS = ["Who are you?", "What is the moon?", "2 + 3 =", "The sea is", "Name a colour."]
MINUTE = 60.0  # of requests for all models at once
NAMES = ("base", "one", "two")


@pytest.fixture(scope="module")
def made(tmp_path_factory, smollm2):
    """A pretrained model, and two that differ from it in 5 % of each matrix: their deltas, and what these make of it."""
    vllm_servers.command()
    folder = tmp_path_factory.mktemp("served")
    (folder / "base").symlink_to(smollm2)
    for seed, name in enumerate(NAMES[1:]):
        builders.changed_copy(smollm2, folder / f"changed-{name}", seed, shift=0.005)
        delta, cache = folder / f"{name}.delta", ("--cache-dir", folder / "cache")
        liftdist("diff", folder / "base", folder / f"changed-{name}", "--output", delta, *cache)
        liftdist("export", delta, "--base", folder / "base", "--format", "hf", "--output", folder / name, *cache)
    damaged = bytearray((folder / "two.delta").read_bytes())
    damaged[-100] ^= 1
    (folder / "damaged.delta").write_bytes(damaged)
    return folder


@contextmanager
def serving(made, model, *deltas, log="log", more=(), examples=(), **variables):
    words = [sys.executable, ROOT / "liftdist" / "start.py", "liftdist", "serve", made / model]
    words += ["--vllm", vllm_servers.command(), "--cache-dir", made / "cache"]
    words += [word for name in deltas for word in ("--delta", f"{name}={made}/{name}.delta")]
    words += [word for name in examples for word in ("--examples", f"{name}={made}/{name}.jsonl")]
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "base", *more]
    with vllm_servers.started(words, made / log, after=["--", *options], **variables) as running:
        yield running


def post(url, path, body, key=""):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None, headers)
    return urllib.request.urlopen(request, timeout=600)


def asked(model, question, **others):
    settings = dict(temperature=0, max_tokens=8, min_tokens=8, logprobs=1, return_token_ids=True)
    return dict(model=model, prompt=question) | settings | others


def answer(url, model, question, key=""):
    """Token ids and their log-probabilities."""
    found = json.load(post(url, "/v1/completions", asked(model, question), key))
    assert found["model"] == model
    choice = found["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def streamed(url, model, question):
    ids = []
    for line in post(url, "/v1/completions", asked(model, question, stream=True)):
        if line.startswith(b"data: {"):
            part = json.loads(line[6:])
            assert part["model"] == model
            ids += part["choices"][0]["token_ids"]
    return ids


@pytest.fixture(scope="module")
def expected(made):
    """What servers of the merged models answer, by model and question."""
    found = {}
    for name in NAMES:
        with serving(made, name, log=f"log-{name}") as (url, _):
            found |= {(name, question): answer(url, "base", question) for question in QUESTIONS}
    for question in QUESTIONS:
        assert len({tuple(found[name, question][0]) for name in NAMES}) == 3  # a mixture of any two would show
    return found


def test_models_are_served_side_by_side_each_as_itself(made, expected):
    runtime = dict(VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")  # opens vLLM's route for more of them
    with serving(made, "base", "one", **runtime) as (url, process):
        models = {one["id"]: one for one in json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=60))["data"]}
        assert models["one"]["parent"] == "base"
        assert models["one"]["root"] == f"{made}/one.delta"
        for name in ("base", "one", "base", "one"):  # applied, undone, applied again
            for question in QUESTIONS:  # prefixes that were computed with other weights are forgotten
                assert answer(url, name, question) == expected[name, question]

        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, "/v1/load_lora_adapter", dict(lora_name="two", lora_path=f"{made}/damaged.delta"))
        assert "do not match the sha256" in refused.value.read().decode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, "/v1/load_lora_adapter", dict(lora_name="text", lora_path=f"{made}/two.delta"))
        assert "kind of content" in refused.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            answer(url, "two", QUESTIONS[0])
        assert answer(url, "one", QUESTIONS[0]) == expected["one", QUESTIONS[0]]
        post(url, "/v1/load_lora_adapter", dict(lora_name="two", lora_path=f"{made}/two.delta"))

        post(url, "/v1/unload_lora_adapter", dict(lora_name="two"))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            answer(url, "two", QUESTIONS[0])
        assert answer(url, "one", QUESTIONS[0]) == expected["one", QUESTIONS[0]]
        post(url, "/v1/load_lora_adapter", dict(lora_name="two", lora_path=f"{made}/two.delta"))

        check_many(url, expected)
        figures = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        for name in ("liftdist_switch_seconds_count", "liftdist_drain_seconds_count", "liftdist_wait_seconds_count"):
            assert name in figures

        os.killpg(process.pid, signal.SIGKILL)
    with serving(made, "base", "one", "two") as (url, _):
        for name in reversed(NAMES):
            assert answer(url, name, QUESTIONS[0]) == expected[name, QUESTIONS[0]]
            assert streamed(url, name, QUESTIONS[1]) == expected[name, QUESTIONS[1]][0]


def test_auto_is_the_model_whose_examples_are_nearest(made):
    asks = {
        "base": ["What is 2 + 3?", "What is 40 - 8?", "What is 7 * 6?", "What is 12 + 30?"],
        "one": ["Name a red flower.", "Name a river in Spain.", "Name a large bird.", "Name an old song."],
    }
    for name, texts in asks.items():
        lines = [json.dumps(dict(question=text, answer="yes")) for text in texts[:3]]
        (made / f"{name}.jsonl").write_text("\n".join(lines))
    settings = dict(temperature=0, max_tokens=8, min_tokens=8, return_token_ids=True)
    runtime = dict(VLLM_API_KEY="k", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    with serving(made, "base", "one", log="log-auto", examples=asks, **runtime) as (url, _):
        for name, texts in asks.items():
            own = answer(url, name, texts[-1], key="k")
            for path, asking in (
                ("completions", dict(prompt=texts[-1])),
                ("chat/completions", dict(messages=[dict(role="user", content=texts[-1])])),
                ("completions", dict(prompt=texts[-1], stream=True)),
            ):
                reply = post(url, f"/v1/{path}", dict(model="auto") | settings | asking, key="k").read().decode()
                parts = [line.removeprefix("data: ") for line in reply.splitlines() if line]
                found = [json.loads(part) for part in parts if part != "[DONE]"]
                assert {one["model"] for one in found} == {name}
                if "prompt" in asking:
                    assert [token for one in found for token in one["choices"][0]["token_ids"]] == own[0]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(url, "/v1/chat/completions", dict(model="auto", messages=[]), key="k")
        with pytest.raises(urllib.error.HTTPError, match="500") as refused:
            post(url, "/v1/load_lora_adapter", dict(lora_name="auto", lora_path=f"{made}/two.delta"), key="k")
        assert "auto: is the name of another model" in refused.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, "/v1/completions", asked("auto", "Name a tree."))
        figures = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        for name in asks:
            assert f'liftdist_routed_requests_total{{model="{name}"}} 3.0' in figures
        listed = json.load(post(url, "/v1/models", None, key="k"))["data"]
        assert [one["id"] for one in listed] == ["base", "one", "auto"]


def check_many(url, expected):
    """Requests of eight clients for all models at once, streamed or not; some go away before they are answered."""
    ends, served, lock = time.monotonic() + MINUTE, dict.fromkeys(NAMES, 0), threading.Lock()

    def client(number):
        chance = random.Random(number)
        while time.monotonic() < ends:
            name, question = chance.choice(NAMES), chance.choice(QUESTIONS)
            if chance.random() < 0.2:
                reply = post(url, "/v1/completions", asked(name, question, max_tokens=200, stream=True))
                reply.readline()
                reply.close()
                continue
            found = streamed(url, name, question) if number % 2 else answer(url, name, question)[0]
            assert found == expected[name, question][0]
            with lock:
                served[name] += 1

    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(client, number) for number in range(8)]:
            one.result()
    print("answers", served, flush=True)
    assert min(served.values()) >= 3


def test_an_engine_that_cannot_serve_deltas_is_refused_in_one_line(made):
    (made / "vllm.yaml").write_text("enable-lora: true\n")  # what the command line cannot show
    words = ("--config", made / "vllm.yaml")
    with pytest.raises(AssertionError), serving(made, "base", "one", log="log-lora", more=words):
        pass
    said = (made / "log-lora").read_text()
    assert "liftdist: vLLM serves LoRA adapters" in said
    assert "Traceback" not in said
