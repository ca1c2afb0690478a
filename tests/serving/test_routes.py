"""A request goes to the model whose examples are nearest to it: on a real embedding, and over HTTP in front of a server."""

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import builders
import pytest
import reasoning_gym
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors.torch import load_file

from liftdist.errors import UserError
from liftdist.serving import examples, launch
from liftdist.serving.router import Router
from liftdist.serving.routing import Embedding, Routes, asked

KINDS = {"sums": "chain_sum", "words": "word_sorting", "stories": "gsm_symbolic"}


def questions(kind, seed, size):
    return [one["question"] for one in reasoning_gym.create_dataset(kind, seed=seed, size=size)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eight examples for each kind of question, in three formats."""
    folder = tmp_path_factory.mktemp("examples")
    made = dict(
        sums=lambda text: dict(question=text, answer="5"),
        words=lambda text: dict(prompt=text, completion=" a, b"),
        stories=lambda text: dict(
            messages=[
                dict(role="system", content="sort sums"),
                dict(role="user", content=[dict(type="text", text=text)]),
                dict(role="assistant", content="9"),
            ]
        ),
    )
    for name, kind in KINDS.items():
        lines = [json.dumps(made[name](text)) for text in questions(kind, 1, 8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def routes(files, smollm2):
    return examples.routes(smollm2, {name: str(files / f"{name}.jsonl") for name in KINDS})


def test_questions_of_other_seeds_go_to_the_model_of_their_kind(routes, tmp_path):
    routes.save(tmp_path / "routes")
    routes = Routes.load(tmp_path / "routes")
    embedding, right = Embedding(routes.table), 0
    for name, kind in KINDS.items():
        right += sum(routes.choose(embedding(text)) == name for text in questions(kind, 2, 30))
    assert right >= 87  # of 90


def test_a_feature_is_the_mean_of_the_embedding_over_the_tokens_of_what_is_asked(routes, smollm2, tokenizer):
    embedding = Embedding(routes.table)
    weight = load_file(smollm2 / "model.safetensors")["model.embed_tokens.weight"].float()
    for name, kind in KINDS.items():
        expected = []
        for text in questions(kind, 1, 8):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected.append(weight[ids].mean(0))
            torch.testing.assert_close(embedding(text), expected[-1])
            torch.testing.assert_close(embedding(ids), expected[-1])
        own = routes.features[routes.labels == routes.names.index(name)]
        torch.testing.assert_close(own, torch.nn.functional.normalize(torch.stack(expected) - routes.center, dim=1))
    torch.testing.assert_close(embedding("a\ud800"), embedding("a?"))
    for nothing in ("", [-1], [len(weight)], [10**30]):
        with pytest.raises(ValueError, match="no text|not below 49152"):
            embedding(nothing)


@pytest.mark.parametrize(
    ("nearest", "chosen"), [("abbaa", "b"), ("abcaa", "a"), ("aabbb", "a"), ("cab", "c"), ("ba", "b")]
)
def test_the_three_nearest_vote_and_of_equal_votes_the_nearest_has_it(nearest, chosen):
    angles = torch.arange(1, len(nearest) + 1) / 10
    features = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor(["abc".index(name) for name in nearest])
    order = torch.randperm(len(nearest), generator=torch.Generator().manual_seed(0))
    routes = Routes(None, ["a", "b", "c"], labels[order], features[order], torch.tensor([5.0, 7.0]))
    assert routes.choose(torch.tensor([8.0, 7.0])) == chosen


def test_what_a_request_asks_is_read_of_every_form():
    turns = [
        dict(role="system", content="s"),
        dict(role="user", content="a"),
        dict(role="assistant", content="x"),
        dict(role="user", content=[dict(type="text", text="b"), dict(type="image_url", image_url={}), "c", None]),
        dict(role="user"),
    ]
    assert asked(dict(messages=turns)) == asked(dict(input=turns)) == "a\nb"
    assert asked(dict(prompt="a")) == asked(dict(prompt=["a"])) == asked(dict(input="a", prompt=None)) == "a"
    assert asked(dict(prompt=[1, 2])) == asked(dict(prompt=[[1, 2]])) == [1, 2]
    for request in ({}, dict(prompt=["a", "b"]), dict(prompt=[[1], [2]]), dict(prompt=3), dict(messages=[])):
        with pytest.raises(ValueError, match="neither messages nor one prompt"):
            asked(request)


def test_a_long_file_has_as_many_examples_as_another_from_all_of_it(files, smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(examples, "MOST", 3)
    words = [dict(question=text, answer="") for text in ("zero", "one", "two", "three", "four", "five", "six")]
    (tmp_path / "many.json").write_text(json.dumps(words))
    found = examples.routes(smollm2, {"many": str(tmp_path / "many.json"), "sums": str(files / "sums.jsonl")})
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    embedding = Embedding(found.table)
    for feature, text in zip(found.features, ("zero", "two", "four"), strict=False):
        torch.testing.assert_close(feature, torch.nn.functional.normalize(embedding(text) - found.center, dim=0))
    assert f"examples many: 3 of 7 records of {tmp_path}/many.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["sums"], "--examples sums: must be NAME=FILE"),
        (["=sums.jsonl"], "must be NAME=FILE"),
        (["other=sums.jsonl"], "no model other is served; name one of sums, base"),
        (["sums=sums.jsonl", "sums=words.jsonl"], "sums has examples already"),
        (["sums=sums.jsonl"], "auto has one model to choose from; give examples of another"),
        (["sums=sums.jsonl", "base=none.jsonl"], "none.jsonl: no such file"),
        (["sums=sums.jsonl", "base=empty.jsonl"], "empty.jsonl: holds no record"),
        (["sums=sums.jsonl", "base=fields.jsonl"], "fields.jsonl:1: fields a, b are those of no format"),
        (["sums=sums.jsonl", "base=text.jsonl"], "text.jsonl:1: has no text by which to choose"),
        (["sums=sums.jsonl", "base=blank.jsonl"], "blank.jsonl:2: has no text by which to choose"),
        (["sums=sums.jsonl", "base=broken.jsonl"], "broken.jsonl:1: "),
    ],
)
def test_examples_that_cannot_be_chosen_by_are_refused(files, smollm2, given, problem):
    held = dict(
        empty="",
        fields='{"a": 1, "b": 2}',
        text='{"text": "a"}',
        broken='{"prompt"',
        blank='{"question": "a", "answer": "b"}\n',
    )
    held["blank"] += '{"question": "", "answer": "b"}'
    for name, text in held.items():
        (files / f"{name}.jsonl").write_text(text)
    words = [text.replace("=", f"={files}/") if text[0] != "=" else text for text in given]
    with pytest.raises(UserError, match=problem.replace(".", r"\.")) as refused:
        launch.routes_of(smollm2, words, ["sums", "base"])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_routes_are_handed_to_the_process_that_this_one_becomes(files, smollm2):
    becoming = (
        "import os, sys; from pathlib import Path; from liftdist.serving import launch\n"
        "routes = launch.routes_of(Path(sys.argv[1]), sys.argv[2:], ['sums', 'base'])\n"
        "os.execv(sys.executable, [sys.executable, '-c', os.environ['AFTER'], str(routes)])"
    )
    after = (
        "import sys; from pathlib import Path; from liftdist.serving.routing import Routes\n"
        "print(Routes.load(Path(sys.argv[1])).names)"
    )
    given = [f"base={files}/words.jsonl", f"sums={files}/sums.jsonl"]
    words = [sys.executable, "-c", becoming, smollm2, *given]
    ended = subprocess.run(words, env={**os.environ, "AFTER": after}, capture_output=True, text=True, check=True)
    assert ended.stdout == "['base', 'sums']\n"


def test_a_model_that_is_called_auto_is_not_chosen_for(files, smollm2):
    with pytest.raises(UserError, match="the model auto chooses by them"):
        launch.routes_of(smollm2, [f"base={files}/sums.jsonl"], ["auto", "base"])


def test_a_base_model_without_a_tokenizer_of_one_file_is_refused(files, smollm2, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        examples.table_of(tmp_path)
    folder = builders.llama(tmp_path / "base", smollm2)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read: .*; save the tokenizer again$"):
        examples.routes(folder, {name: str(files / f"{name}.jsonl") for name in KINDS})


@contextmanager
def listening(app):
    """Serve an ASGI application; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def front(routes):
    """A server that repeats what it is asked if the key is right, behind the router; its address, and the models chosen."""
    app, chosen = FastAPI(), []

    @app.middleware("http")
    async def check(request, call_next):
        is_open = request.headers.get("authorization") == "Bearer key"
        return await call_next(request) if is_open else JSONResponse({}, 401)

    @app.get("/v1/models")
    async def models():
        return dict(object="list", data=[dict(id="base", root="/base", parent=None, max_model_len=256)])

    @app.post("/v1/read")
    async def read(request: Request):
        return (await request.body()).decode()

    @app.post("/v1/completions")
    async def complete(body: dict):
        return body

    Router.routes, Router.count = routes, chosen.append
    app.add_middleware(Router)
    with listening(app) as url:
        yield url, chosen


def asking(front, path, body, kind="application/json", key="key"):
    body = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind, "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(front[0] + path, body, headers), timeout=60) as reply:
        return json.loads(reply.read())


def refused(*words, **others):
    with pytest.raises(urllib.error.HTTPError) as found:
        asking(*words, **others)
    return found.value.code, found.value.read().decode()


def test_a_request_for_auto_goes_on_for_the_model_of_its_kind_and_is_otherwise_as_it_was(front):
    for name, kind in KINDS.items():
        text = questions(kind, 3, 1)[0]
        whole = dict(model="auto", prompt=text, seed=2**60 + 1, temperature=0.1, stop=["é"])
        assert asking(front, "/v1/completions", whole) == whole | dict(model=name)
        long = dict(model="auto", input=[dict(role="user", content=text)], padding="x" * 2**20)  # comes in parts
        assert asking(front, "/v1/completions", long, "application/JSON; charset=utf-8") == long | dict(model=name)
        assert front[1][-2:] == [name, name]


def test_what_is_not_for_auto_goes_on_to_the_byte(front):
    before = list(front[1])
    for body in (
        b'{"model": "words" , "prompt": "auto"}',
        b'{"model": "auto"',
        b'["auto"]',
        b'{"model": ["auto"]}',
        b"",
    ):
        assert asking(front, "/v1/read", body) == body.decode()
    form = b'model="auto"'
    assert asking(front, "/v1/read", form, "application/x-www-form-urlencoded") == form.decode()
    assert front[1] == before


def test_a_request_without_a_text_is_refused_and_one_without_the_key_not_read(front):
    before = list(front[1])
    for body in (dict(model="auto"), dict(model="auto", prompt="")):
        code, told = refused(front, "/v1/completions", body)
        assert code == 400
        assert "model auto: the request has neither messages nor one prompt; name a model of /v1/models" in told
    assert "has no text by which to choose" in refused(front, "/v1/completions", dict(model="auto", messages=[{}]))[1]
    assert refused(front, "/v1/completions", dict(model="auto", prompt="2 + 3"), key="other") == (401, "{}")
    assert front[1] == before


def test_auto_is_listed_beside_the_models_that_it_chooses_from(front):
    base, auto = asking(front, "/v1/models", None)["data"]
    assert base == dict(id="base", root="/base", parent=None, max_model_len=256)
    assert auto == base | dict(id="auto", root=None, parent="base")
    assert refused(front, "/v1/models", None, key="other") == (401, "{}")
