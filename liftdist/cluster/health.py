"""Node health: which nodes can run, checked before ranks start, and which were lost, checked after they ended.

Runs no command of SLURM, and imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from liftdist import environment, files, network
from liftdist.cluster import rollcall
from liftdist.cluster.rollcall import Report
from liftdist.errors import UserError
from liftdist.heartbeat import HEARTBEAT

PROBLEMS = "problems.json"  # in the folder of logs: what the check of the nodes found
NOW = "now"  # a file there, as old as the end of the training step
SILENT = 4 * HEARTBEAT  # seconds without a heartbeat after which a node counts as lost
CHECK_TIMEOUT = 120.0  # seconds that nodes have to find each other
SLURMD_PORT = 6818  # where nodes listen unless SLURM says otherwise
COMPARED = ("liftdist", "torch", "transformers")


def check(nodes: Sequence[str], logs: Path, head: str, secret: str) -> list[tuple[str, str]]:
    """Run on every node at once: the head collects a report from each node and returns those that cannot be used.

    Args:
        head: address and port at which it listens.
        secret: of this start of the job; reports that are not signed with it are ignored.

    Returns:
        On the head ``(node, problem)`` of those to do without; elsewhere nothing.

    Raises:
        UserError: this node does not reach the head; nodes differ in what is installed, or do not see the run directory.
        OSError: the head cannot listen.
    """
    facts = facts_of(environment.SLURMD_NODENAME.need(), logs)
    address, port = network.split_endpoint(head)
    if environment.SLURM_NODEID.need():
        rollcall.report(facts, secret, address, port, CHECK_TIMEOUT)
        return []
    others = [name for name in nodes if name != facts["node"]]
    heard = rollcall.hear(others, secret, address, port, CHECK_TIMEOUT) if others else {}
    for name, report in {facts["node"]: facts, **heard}.items():
        for key in ("python", *COMPARED):
            if report.get(key) != facts[key]:  # another version may report fewer keys
                raise UserError(f"{name} has {key} {report.get(key, 'unknown')}, but {facts['node']} has {facts[key]}")
        if report.get("problem"):
            raise UserError(f"{name}: {report['problem']}")
    return [(name, f"no report within {CHECK_TIMEOUT:.0f} s") for name in others if name not in heard]


def facts_of(node: str, logs: Path) -> Report:
    """The report of this node."""
    facts: Report = {
        "node": node,
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


def lost(nodes: Sequence[str], logs: Path, scontrol_output: str) -> list[str]:
    """Nodes that are lost: without heartbeats, unreachable, or down according to SLURM."""
    gone = {name for name, problem in _problems(logs) if problem}
    with contextlib.suppress(FileNotFoundError):
        gone.update(without_heartbeat(nodes, logs, (logs / NOW).lstat().st_mtime))
    addresses = {}
    for block in re.split(r"(?m)^(?=NodeName=)", scontrol_output):
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


def without_heartbeat(nodes: Sequence[str], logs: Path, now: float | None = None) -> list[str]:
    """Nodes whose last sign of life is much older than ``now``, or than that of the others, and that did not say goodbye."""
    heard: dict[int, float] = {}
    for path in logs.glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            ended = "ended" in json.loads(files.read(path))
            heard[int(path.stem.removeprefix("node-"))] = math.inf if ended else path.lstat().st_mtime
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
        return [(str(name), str(problem)) for name, problem in json.loads(files.read(logs / PROBLEMS))]
    except (OSError, ValueError, TypeError):
        return []
