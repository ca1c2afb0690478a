"""In front of vLLM's API server: the model ``auto``, in whose place a request is given the model that its text is for.

    POST /v1/... {"model": "auto", "messages": ...}   ->   {"model": NAME, "messages": ...}       an answer says NAME
    GET /v1/models                                    ->   lists auto, too

An ASGI middleware, with ``--middleware liftdist.serving.router.Router``. It reads a body when the server does, which is after the
key has been asked for. What it does not know, such as a form, goes on as it came, and vLLM knows no model ``auto``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liftdist.serving.routing import AUTO, Embedding, Routes, asked


class Router:
    """Requests for ``auto`` go on as requests for the model that their text is for."""

    routes: ClassVar[Routes]
    count: ClassVar[Callable[[str], None]]  # is given the name of each model that is chosen

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._embedding = Embedding(self.routes.table)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _is_json(scope):
            await self._route(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "GET" and scope["path"].endswith("/v1/models"):
            await self._app(scope, receive, _listing(send))
        else:
            await self._app(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the server read the body as one message, with the name of a model; or answer in its place."""
        is_read = is_refused = False

        async def routed() -> Message:
            nonlocal is_read, is_refused
            if is_read:
                return await receive()
            parts, is_read = [], True
            while True:
                message = await receive()
                if message["type"] != "http.request":  # the client has gone
                    return message
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    break
            try:
                return {"type": "http.request", "body": await self._named(b"".join(parts)), "more_body": False}
            except ValueError as error:
                said = f"model {AUTO}: the request {error}; name a model of /v1/models"
                about = {"message": said, "type": "BadRequestError", "param": "model", "code": 400}
                await _send(send, 400, [(b"content-type", b"application/json")], {"error": about})
                is_refused = True
                return {"type": "http.disconnect"}

        async def answer(message: Message) -> None:
            if not is_refused:
                await send(message)

        await self._app(scope, routed, answer)

    async def _named(self, body: bytes) -> bytes:
        """The body with the name of a model in the place of ``auto``. Raises ``ValueError`` if it has no text to choose by."""
        if f'"{AUTO}"'.encode() not in body:
            return body
        try:
            request = json.loads(body)
        except ValueError:  # the server says so
            return body
        if not isinstance(request, dict) or request.get("model") != AUTO:
            return body
        name = self.routes.choose(await asyncio.to_thread(self._embedding, asked(request)))
        type(self).count(name)
        return json.dumps(request | {"model": name}).encode()


def _is_json(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return any(value.lower().startswith(b"application/json") for value in kinds)


def _listing(send: Send) -> Send:
    """Adds ``auto`` to a list of models."""
    began: Message = {}
    parts: list[bytes] = []

    async def listing(message: Message) -> None:
        nonlocal began
        if message["type"] == "http.response.start" and message["status"] == 200:
            began = message
        elif not began:
            await send(message)
        else:
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                found = json.loads(b"".join(parts))
                base = found["data"][0]
                found["data"].append(base | {"id": AUTO, "root": None, "parent": base["id"]})
                await _send(send, began["status"], began["headers"], found)

    return listing


async def _send(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], found: Any) -> None:
    body = json.dumps(found).encode()
    others = [(name, value) for name, value in headers if name != b"content-length"]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*others, length]})
    await send({"type": "http.response.body", "body": body})
