"""Which nodes of a job are fit, asked before ranks start, and which are gone, asked after they ended.

Runs no command of SLURM, and imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from liftdist import network
from liftdist.errors import UserError
from liftdist.heartbeat import HEARTBEAT

PROBLEMS = "problems.json"  # in the folder of logs: what the check of the nodes found
SILENT = 4 * HEARTBEAT  # seconds without a sign of life after which a node is taken for dead
CHECK_TIMEOUT = 120.0  # seconds that nodes have to find each other
SLURMD_PORT = 6818  # where nodes listen unless SLURM says otherwise
COMPARED = ("liftdist", "torch", "transformers")


def check(nodes: Sequence[str], logs: Path, head: str) -> list[tuple[str, str]]:
    """On every node at once: the head hears of each of them, and says which are not fit.

    Returns:
        On the head ``(node, problem)`` of those to do without; elsewhere nothing.

    Raises:
        UserError: this node does not reach the head; nodes differ in what is installed, or do not see the run directory.
    """
    facts = _facts(logs)
    address, port = network.split_endpoint(head)
    if int(os.environ["SLURM_NODEID"]):
        _report(facts, address, port)
        return []
    heard = _hear(facts, port, nodes)
    for name, said in heard.items():
        for key in ("python", *COMPARED):
            if said[key] != facts[key]:
                raise UserError(f"{name} has {key} {said[key]}, but {facts['node']} has {facts[key]}")
        if said["problem"]:
            raise UserError(f"{name}: {said['problem']}")
    return [(name, f"no word within {CHECK_TIMEOUT:.0f} s") for name in nodes if name not in heard]


def _facts(logs: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "node": os.environ["SLURMD_NODENAME"],
        "python": platform.python_version(),
        "problem": None,
    }
    for name in COMPARED:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    if not logs.is_dir():
        facts["problem"] = f"does not see {logs}: the run directory must be on a shared file system"
    return facts


def _report(facts: dict[str, Any], address: str, port: int) -> None:
    """Tell the head, and wait for its answer."""
    ends = time.monotonic() + CHECK_TIMEOUT
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                connection.sendall(json.dumps(facts).encode() + b"\n")
                connection.settimeout(CHECK_TIMEOUT)
                connection.recv(1)
                return
        except OSError as error:
            if time.monotonic() > ends:
                reason = error.strerror or error
                raise UserError(f"{facts['node']}: cannot reach the head, {address} port {port}: {reason}") from None
            time.sleep(0.2)


def _hear(facts: dict[str, Any], port: int, nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each node says, by name; on the head."""
    heard = {facts["node"]: facts}
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    connections = []
    with socket.create_server(
        ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=len(nodes)
    ) as server:
        ends = time.monotonic() + CHECK_TIMEOUT
        while len(heard) < len(nodes) and (left := ends - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection, _ = server.accept()
                connections.append(connection)
                connection.settimeout(5)
                said = json.loads(connection.makefile().readline(10_000))
                if said["node"] in nodes:
                    heard[said["node"]] = said
        for connection in connections:
            connection.close()
    return heard


def silent(nodes: Sequence[str], logs: Path, said: str) -> list[str]:
    """Nodes that are gone: not heard of, out of reach, or down by SLURM's word."""
    gone = {name for name, problem in _problems(logs) if problem}
    with contextlib.suppress(FileNotFoundError):
        gone.update(unheard(nodes, logs, (logs / "now").stat().st_mtime))  # touched when the training step ended
    addresses = {}
    for block in re.split(r"(?m)^(?=NodeName=)", said):
        found = {
            key: re.search(rf"(?m)(?:^|\s){key}=(\S+)", block) for key in ("NodeName", "State", "NodeAddr", "Port")
        }
        name, state, address, port = (match[1] if match else "" for match in found.values())
        if name in nodes:
            addresses[name] = (address, int(port or SLURMD_PORT))
            if re.search(r"DOWN|FAIL|NOT_RESPONDING|POWERED|\*", state):
                gone.add(name)
    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = pool.map(lambda place: _answers(*place), addresses.values())
        gone.update(name for name, answer in zip(addresses, answers, strict=True) if not answer)
    return [name for name in nodes if name in gone]


def unheard(nodes: Sequence[str], logs: Path, now: float | None = None) -> list[str]:
    """Nodes whose last sign of life is much older than ``now``, or than that of the others, and that did not say goodbye."""
    heard: dict[int, float] = {}
    for path in logs.glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError):
            ended = "ended" in json.loads(path.read_text())
            heard[int(path.stem.removeprefix("node-"))] = math.inf if ended else path.stat().st_mtime
    if not heard:
        return []
    newest = now if now is not None else max((when for when in heard.values() if when < math.inf), default=0.0)
    return [name for index, name in enumerate(nodes) if newest - heard.get(index, math.inf) > SILENT]


def _answers(address: str, port: int) -> bool:
    """Whether a machine is there: one that refuses is."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _problems(logs: Path) -> list[tuple[str, str]]:
    try:
        return [(name, problem) for name, problem in json.loads((logs / PROBLEMS).read_text())]
    except (OSError, ValueError, TypeError):
        return []
