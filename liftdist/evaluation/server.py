"""Answers of a model that a vLLM server holds, over its OpenAI-compatible API (https://docs.vllm.ai).

    GET  /models         what it serves: {"id", "root", "max_model_len"}
    POST /completions    {"prompt": token ids, ...}  ->  token ids, or log-probabilities of the prompt's tokens

Token ids travel both ways: words become tokens, and tokens words, here alone. All that decides about an answer is sent along, as
the server's own defaults come from the model's ``generation_config.json``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from liftdist import environment, network
from liftdist.errors import UserError
from liftdist.evaluation_settings import EvalConfig, TaskConfig
from liftdist.models import weights

AT_ONCE = 64  # requests
_PATIENCE = 3600.0  # seconds that the server may take for an answer
_POLL = 1.0  # seconds between two looks at requests to stop
_PLAINLY: dict[str, Any] = dict(  # what a server would take from the model's generation_config.json
    top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
)
_HINTS = {
    401: "; set VLLM_API_KEY",
    404: "; eval.server is the address of the API, such as http://localhost:8000/v1",
}


@dataclass(frozen=True)
class Server:
    """A model that a server holds. Its methods are those of :class:`liftdist.evaluation.generation.Answering`."""

    url: str  # of the API, ending in /v1
    model: str  # as the server calls it
    root: str  # its folder on the server's machine, or its name on the hub
    room: int  # tokens of a prompt and its answer
    is_named: bool  # by ``eval.server_model``

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        task: TaskConfig,
        stops: Sequence[int],
        seed: int,
        beat: Callable[[], None],
    ) -> list[list[int]]:
        """Raises ``UserError`` if the server fails, or does not answer as it was asked."""
        sampling: dict[str, Any] = dict(temperature=task.temperature, top_p=task.top_p if task.temperature else 1.0)
        sampling |= dict(max_tokens=task.max_new_tokens, stop_token_ids=list(stops), ignore_eos=True)  # these alone
        requests = [
            dict(prompt=list(prompt), seed=seed + number, return_token_ids=True, **sampling)
            for number, prompt in enumerate(prompts)
        ]
        return [self._said(choice, task, stops) for choice in self._complete(requests, beat)]

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], beat: Callable[[], None]
    ) -> list[float]:
        """Raises ``UserError`` if the server fails, or does not give the log-probabilities of prompts."""
        rows = [[*prompt, *continuation] for prompt, continuation in pairs]
        requests = [dict(prompt=row, max_tokens=1, temperature=0.0, prompt_logprobs=0) for row in rows]
        found = []
        for (prompt, _), row, choice in zip(pairs, rows, self._complete(requests, beat), strict=True):
            known = choice.get("prompt_logprobs")
            if not isinstance(known, list) or len(known) != len(row):
                raise self._error("gives no prompt_logprobs, as vLLM does; ask the model itself, without eval.server")
            places = range(len(prompt), len(row))
            found.append(math.fsum(known[place][str(row[place])]["logprob"] for place in places))
        return found

    def check(self, name: str, folder: Path, cache_dir: Path) -> str | None:
        """Check that this is a model, as far as the server says what it holds; return what to tell the user, if anything.

        Args:
            name: of the model on the hub, or its folder.
            folder: where it lies here.

        Raises:
            UserError: it is another model, or one that cannot be known and that the user has not named.
        """
        root = Path(self.root)
        if os.access(self.root, os.R_OK):
            is_it = root.resolve() == folder.resolve()
            if not (is_it or weights.digest(root, cache_dir) == weights.digest(folder, cache_dir)):
                raise self._error(f"serves {root}, whose weights are not those of {folder}; start vllm serve {folder}")
        elif self.root != name:
            if not self.is_named:
                raise self._error(
                    f"serves {self.root or self.model}, which is no folder here, and may be another model than {folder}; if it "
                    f"is the same, say so: eval.server_model={self.model}"
                )
            return f"eval.server: that its {self.root or self.model} is {folder} is not checked: it is no folder here"
        return None

    def _said(self, choice: dict[str, Any], task: TaskConfig, stops: Sequence[int]) -> list[int]:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list):
            raise self._error("gives no token_ids; eval.server takes vLLM 0.10.2 or newer")
        end = next((number for number, token in enumerate(ids) if token in stops), len(ids))
        if end == len(ids) < task.max_new_tokens:
            raise self._error(
                f"ended an answer after {len(ids)} of {task.max_new_tokens} tokens ({reason}); if the model's "
                f"generation_config.json says so: vllm serve --generation-config vllm"
            )
        return ids[:end]

    def _complete(self, requests: Sequence[dict[str, Any]], beat: Callable[[], None]) -> list[dict[str, Any]]:
        """The choice of each request, ``AT_ONCE`` of them at once; the first error ends all."""
        waiting = deque(enumerate(requests))
        done: queue.SimpleQueue[tuple[int, dict[str, Any] | Exception]] = queue.SimpleQueue()

        def work() -> None:
            with contextlib.suppress(IndexError):  # none is left
                while True:
                    number, request = waiting.popleft()
                    try:
                        done.put((number, self._choice(request)))
                    except Exception as error:
                        done.put((number, error))

        for _ in range(min(AT_ONCE, len(requests))):
            threading.Thread(target=work, daemon=True).start()  # no end of this process waits for an answer
        found: dict[int, dict[str, Any]] = {}
        try:
            while len(found) < len(requests):
                beat()
                with contextlib.suppress(queue.Empty):
                    number, reply = done.get(timeout=_POLL)
                    if isinstance(reply, Exception):
                        raise reply
                    found[number] = reply
        finally:
            waiting.clear()
        return [found[number] for number in range(len(requests))]

    def _choice(self, request: dict[str, Any]) -> dict[str, Any]:
        choices = call(f"{self.url}/completions", dict(model=self.model, **_PLAINLY, **request)).get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._error("gives no choice, as the API has it")
        return choices[0]

    def _error(self, problem: str) -> UserError:
        return UserError(f"eval.server {self.url}: {problem}")


def connect(config: EvalConfig) -> Server:
    """The model that ``eval.server`` holds: that of the name ``eval.server_model``, or the only one.

    Raises:
        UserError: the server cannot be reached, or there is no such model, or it is an adapter.
    """
    assert config.server is not None
    url = config.server.rstrip("/")
    served = {str(one["id"]): one for one in call(f"{url}/models").get("data", ()) if "id" in one}
    name = config.server_model or (next(iter(served)) if len(served) == 1 else None)
    if name not in served:
        problem = "no model of this name is served" if name else "must be given where several models are served"
        raise UserError(f"eval.server_model{f' {name}' if name else ''}: {problem}; there are: {', '.join(served)}")
    found = served[name]
    if found.get("parent"):
        raise UserError(
            f"eval.server_model {name}: is an adapter of {found['parent']}; serve the model it is merged into"
        )
    if not isinstance(found.get("max_model_len"), int):
        raise UserError(
            f"eval.server {url}: does not say max_model_len of {name}, as vLLM does; no other server is taken"
        )
    is_named = config.server_model is not None
    return Server(url, name, str(found.get("root") or ""), found["max_model_len"], is_named)


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that a server gives; with ``body`` by POST. Raises ``UserError`` if there is none."""
    headers = {"Content-Type": "application/json"}
    if (key := environment.VLLM_API_KEY.get()) is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        host = urlsplit(url).hostname or ""
        is_here = host == "localhost" or network.is_loopback(host)  # where no proxy helps
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if is_here else None))
        request = urllib.request.Request(url, data, headers)
        with opener.open(request, timeout=60.0 if body is None else _PATIENCE) as reply:
            found = json.load(reply)
        if not isinstance(found, dict):
            raise ValueError("what it sends is no JSON object")
        return found
    except urllib.error.HTTPError as error:
        text = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = " ".join(error.read(1000).decode(errors="replace").split())
        problem = f"{error.code} {error.reason}: {text:.300}{_HINTS.get(error.code, '')}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = (
            f"no answer: {getattr(error, 'reason', None) or error or type(error).__name__}; is the server running?"
        )
    raise UserError(f"eval.server {url}: {problem}")
