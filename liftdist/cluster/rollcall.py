"""The nodes of one start report to the head, which confirms each report.

    node -> head    authentication code, space, report as JSON, newline
    head -> node    authentication code of the same report

The codes are HMACs by a secret that only this start of the job has. Other connections are ignored, end nothing and
delay nobody. Imports no torch.
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


def report(facts: Report, secret: str, address: str, port: int, seconds: float) -> None:
    """Send the report of a node to the head of this start, within ``seconds``.

    Raises:
        UserError: it cannot be reached.
    """
    text = json.dumps(facts).encode()
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
            raise UserError(f"{facts['node']}: cannot reach the head, {address} port {port}: {problem}")
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
    """On the head: what each of ``nodes`` reports within ``seconds``, by name; returns as soon as all have reported.

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
        # cancelled once all nodes have reported
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError), contextlib.closing(writer):
            async with asyncio.timeout(PATIENCE):
                text = _authentic(await reader.readline(), secret)
                facts = json.loads(text)
                if not isinstance(facts, dict) or facts.get("node") not in nodes:
                    return
                writer.write(_code(secret, b"confirm", text))
                await writer.drain()
            heard.setdefault(facts["node"], facts)
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
        raise ValueError("a report that is not signed with the secret of this start")
    return text
