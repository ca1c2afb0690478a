"""Nodes of one start find each other: each reports to the head, and has its report confirmed.

    node -> head    authentication code, space, report as JSON, newline
    head -> node    authentication code of the same report

The codes are HMACs by a secret that only this start of the job has. Whoever else connects is not believed, ends nothing, and
delays nobody. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Collection
from typing import Any

from liftdist.errors import UserError

PATIENCE = 5.0  # seconds that one connection may take
LONGEST = 10_000  # bytes of a report
_AGAIN = 0.2  # seconds between two tries of a node

Report = dict[str, Any]


def _code(secret: str, what: bytes, report: bytes) -> bytes:
    return hmac.new(secret.encode(), what + b" " + report, hashlib.sha256).hexdigest().encode()


def report(said: Report, secret: str, address: str, port: int, seconds: float) -> None:
    """Tell the head of this start what is to be said of ``said["node"]``, within ``seconds``.

    Raises:
        UserError: it cannot be reached.
    """
    text = json.dumps(said).encode()
    line, expected = _code(secret, b"report", text) + b" " + text + b"\n", _code(secret, b"confirm", text)
    ends = time.monotonic() + seconds
    while True:
        try:
            answer = _ask(line, len(expected), address, port)
            if hmac.compare_digest(answer, expected):
                return
            problem = "what listens there is not the head of this job"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > ends:
            raise UserError(f"{said['node']}: cannot reach the head, {address} port {port}: {problem}")
        time.sleep(_AGAIN)


def _ask(line: bytes, size: int, address: str, port: int) -> bytes:
    """What is answered to ``line``, at most ``size`` bytes. Raises ``OSError``."""
    ends = time.monotonic() + PATIENCE
    with socket.create_connection((address, port), timeout=PATIENCE) as connection:
        connection.sendall(line)
        answer = b""
        while len(answer) < size:
            connection.settimeout(max(0.001, ends - time.monotonic()))
            if not (part := connection.recv(size - len(answer))):
                break
            answer += part
        return answer


def hear(nodes: Collection[str], secret: str, address: str, port: int, seconds: float) -> dict[str, Report]:
    """On the head: what each of ``nodes`` reports within ``seconds``, by name; ends as soon as all have been heard.

    Args:
        address: of this machine, at which the nodes reach it; nothing listens at others.

    Raises:
        OSError: it cannot listen there.
    """
    return asyncio.run(_hear(nodes, secret, address, port, seconds))


async def _hear(nodes: Collection[str], secret: str, address: str, port: int, seconds: float) -> dict[str, Report]:
    heard: dict[str, Report] = {}
    all_heard = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # cancelled where the head has heard enough
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError), contextlib.closing(writer):
            async with asyncio.timeout(PATIENCE):
                text = _authentic(await reader.readline(), secret)
                said = json.loads(text)
                if not isinstance(said, dict) or said.get("node") not in nodes:
                    return
                writer.write(_code(secret, b"confirm", text))
                await writer.drain()
            heard.setdefault(said["node"], said)
            if len(heard) == len(nodes):
                all_heard.set()

    server = await asyncio.start_server(connected, address, port, limit=LONGEST, backlog=max(100, len(nodes)))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(all_heard.wait(), seconds)
    server.close()
    return heard


def _authentic(line: bytes, secret: str) -> bytes:
    """The report in ``line``. Raises ``ValueError``: it is not of a node of this start."""
    code, _, text = line.rstrip(b"\n").partition(b" ")
    if not hmac.compare_digest(code, _code(secret, b"report", text)):
        raise ValueError("a report of somebody else")
    return text
