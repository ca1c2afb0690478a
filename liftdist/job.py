"""What a SLURM job decides for itself: where it begins, whether its nodes are fit, and what its end means.

    begin -> check, on every node -> training -> end: done, requeue, restart, fail, or nothing because SLURM or a user acts

``slurm/train.sbatch`` runs these three and does what they say. No exit code of a rank decides anything: what counts is what the
run directory holds, what SLURM says of job and nodes, and which nodes have been heard of.

Runs no command of SLURM, so that it works inside a container, and imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from liftdist import changes, failures, files, launcher, preflight, rundir, scheduler
from liftdist import config as configs
from liftdist.config import Config, UserError

JOBS = "jobs.jsonl"  # in the run directory: what its jobs did and why, one line an event
PROBLEMS = "problems.json"  # in the folder of logs: what the check of the nodes found
SILENT = 4 * rundir.HEARTBEAT  # seconds without a sign of life after which a node is taken for dead
CHECK_TIMEOUT = 120.0  # seconds that nodes have to find each other
SLURMD_PORT = 6818  # where nodes listen unless SLURM says otherwise
PREEMPTED, TIME_LIMIT, NODE_FAILURE = "preempted", "time limit", "node failure"  # causes to requeue a job
COMPARED = ("liftdist", "torch", "transformers")

Event = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of the batch script. One task of an array has its own of them, and a run directory of its own.


def parser(**keywords: Any) -> argparse.ArgumentParser:
    """The options of ``slurm/train.sbatch``; all others belong to ``liftdist.train``."""
    made = argparse.ArgumentParser(allow_abbrev=False, **keywords)
    made.add_argument("--sweep", action="append", default=[], metavar="key=a,b,c", help="a job array over these values")
    return made


def of_task(arguments: Sequence[str], index: int | None) -> list[str]:
    """The arguments of one array task: with its values of the swept settings, and a run directory of its own.

    Raises:
        UserError: a sweep of unknown form, an index beyond it.
    """
    options, rest = parser().parse_known_args(list(arguments))
    if index is None:
        if options.sweep:
            raise UserError("--sweep needs a job array: sbatch --array, or `liftdist submit`")
        return rest
    values = sweep(options.sweep)
    if options.sweep and index >= len(values):
        raise UserError(f"array index {index}: the sweep has {len(values)} values, 0 to {len(values) - 1}")
    words = [word for word in rest if not word.startswith("--")]
    chosen = values[index] if options.sweep else []
    config, _ = configs.load(words[0], [*words[1:], *chosen]) if words else (None, "")
    if config is None:
        return rest
    name = "-".join([str(index), *(re.sub(r"[^A-Za-z0-9=._-]", "_", value) for value in chosen)])
    return [*rest, *chosen, f"run_dir={json.dumps(str(Path(config.run_dir) / name))}"]


def sweep(given: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of a sweep: ``["a=1,2", "b=3,4"]`` has four."""
    axes = []
    for text in given:
        key, equals, values = text.partition("=")
        if not key or not equals or not values or "" in values.split(","):
            raise UserError(f"--sweep {text!r}: expected key=a,b,c")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def _load(arguments: Sequence[str]) -> tuple[Config, str, set[str]]:
    words = [word for word in arguments if not word.startswith("--")]
    if not words:
        raise UserError("slurm/train.sbatch: needs a config")
    config, text = configs.load(words[0], words[1:])
    return config, text, changes.allowed_by([word for word in arguments if word.startswith("--")])


# ---------------------------------------------------------------------------------------------------------------------
# The history of a run's jobs.


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """Append an event to the history."""
    with files.open_to_append(run_dir / JOBS) as file:
        file.write(f"\n{json.dumps({'event': event, 'time': round(time.time(), 3), **fields})}\n")


def history(run_dir: Path) -> list[Event]:
    """All events so far; lines that were cut short are left out."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for line in files.read(run_dir / JOBS).splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
    return events


def committed_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that was committed, 0 before the first."""
    events = itertools.chain.from_iterable(rundir.attempts(run_dir).values())
    return max((event["step"] for event in events if event.get("event") == "commit"), default=0)


def _this_start() -> dict[str, Any]:
    job, start = launcher.this_job()
    # the family: this job and those it was submitted again as
    return {"job": job, "start": start, "family": os.environ.get("LIFTDIST_FIRST_JOB", job)}


def start_name(event: Event) -> str:
    """The name of the start of a job that an event is about."""
    return launcher.start_name(event["job"], event["start"])


def refusal(config: Config, events: Sequence[Event], family: str, cause: str, step: int) -> str | None:
    """Why a job may not be requeued for ``cause`` once more: its budget is spent, or nothing was gained since the last time."""
    bounds = {
        PREEMPTED: ("slurm.max_preemptions", config.slurm.max_preemptions),
        TIME_LIMIT: ("slurm.max_time_limits", config.slurm.max_time_limits),
        NODE_FAILURE: ("slurm.max_node_failures", config.slurm.max_node_failures),
    }
    setting, bound = bounds[cause]
    of_cause = [e for e in events if e["event"] == "end" and e["family"] == family and e["cause"] == cause]
    before = [event for event in of_cause if event["action"] in ("requeue", "nothing")]  # by itself, or by SLURM
    if len(before) >= bound:
        return f"requeued {len(before)} times for this, as often as {setting} allows"
    if before and step <= before[-1]["step"]:
        return f"no step was saved since it was last requeued for this, at step {before[-1]['step']}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The beginning.


def begin(arguments: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Check what can be checked, choose a port, and note the start.

    Returns:
        Run directory, folder of logs, ``HOST:PORT`` of the head, then the arguments for the launcher.

    Raises:
        UserError: as ``liftdist train``; an earlier job of the chain failed; SLURM requeued the job too often.
    """
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    resolved = of_task(arguments, int(index) if index is not None else None)
    config, text, allowed = _load(resolved)
    run_dir = Path(config.run_dir).expanduser()
    changes.check_settings(config, text, allowed)
    start, step = _this_start(), committed_step(run_dir)
    try:
        _check_chain(history(run_dir))
        _check_requeued(config, run_dir, start, step)
        preflight.check(config, ranks_per_node(config) * len(nodes), training=True)
    except UserError as error:
        if (run_dir / JOBS).exists():  # those that wait for this job must hear of it
            note(run_dir, "end", **start, cause=None, action="fail", step=step, message=str(error))
        raise
    head = launcher.outgoing_address(launcher.resolve(nodes[1])) if len(nodes) > 1 else "127.0.0.1"
    port = launcher.free_port(int(os.environ["SLURM_JOB_ID"]) * 7)
    logs = rundir.logs(run_dir, start_name(start))
    for path in logs.iterdir():  # of another cluster, where a job had this number
        path.unlink()
    given = next(word for word in resolved if not word.startswith("--"))
    kept = logs / "config.yaml"  # whoever edits his file now means another run
    files.write(kept, Path(given).read_text())
    resolved[resolved.index(given)] = str(kept)
    output = str(Path("/proc/self/fd/2").readlink())
    note(run_dir, "start", **start, nodes=list(nodes), step=step, log=output if output.startswith("/") else None)
    return [str(run_dir), str(logs), f"[{head}]:{port}" if ":" in head else f"{head}:{port}", *resolved]


def ranks_per_node(config: Config) -> int:
    """Ranks that each node starts: as set, or one for each GPU."""
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return config.slurm.ranks_per_node or (int(gpus) if gpus.isdigit() and int(gpus) else 1)


def _check_chain(events: Sequence[Event]) -> None:
    before = os.environ.get("LIFTDIST_AFTER_JOB")
    ends = [event for event in events if event["event"] == "end" and event["job"] == before]
    if ends and ends[-1]["action"] == "fail":
        raise UserError(f"job {before}, before this one, failed: {ends[-1]['message']}; this one does not try again")


def _check_requeued(config: Config, run_dir: Path, start: Event, step: int) -> None:
    """Where SLURM requeued the job by itself: bound that, too.

    A start that could not note its end was killed with its node, or preempted without warning.
    """
    events = history(run_dir)
    mine = [event for event in events if event.get("job") == start["job"] and event["event"] in ("start", "end")]
    if not mine:
        return
    last = mine[-1]
    before = [event for event in events if event is not last]
    if last["event"] == "start":
        silent = _unheard(last["nodes"], rundir.logs(run_dir, start_name(last)))
        of = f", {', '.join(silent)} first" if silent else ""
        message = f"ended without a word at step {step}{of}: a node was lost, or the job was killed"
        lost = {key: last[key] for key in ("job", "start", "family")}
        note(run_dir, "end", **lost, cause=NODE_FAILURE, action="nothing", step=step, message=message)
        print(f"liftdist: start {start_name(last)} {message}", file=sys.stderr)
    elif last["action"] != "nothing" or last["cause"] != NODE_FAILURE:
        return
    if problem := refusal(config, before, start["family"], NODE_FAILURE, step):
        raise UserError(f"requeued by SLURM after a node was lost; {problem}")


# ---------------------------------------------------------------------------------------------------------------------
# The nodes.


def check(nodes: Sequence[str], logs: Path, head: str) -> list[tuple[str, str]]:
    """On every node at once: the head hears of each of them, and says which are not fit.

    Returns:
        On the head ``(node, problem)`` of those to do without; elsewhere nothing.

    Raises:
        UserError: this node does not reach the head; nodes differ in what is installed, or do not see the run directory.
    """
    facts = _facts(logs)
    address, port = launcher.split_endpoint(head)
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


# ---------------------------------------------------------------------------------------------------------------------
# The end.


@dataclass(frozen=True)
class Verdict:
    action: str  # done, requeue, restart, fail; or nothing: SLURM requeues by itself, or a user has cancelled
    message: str  # for the log and the job's comment
    code: int  # exit code of the batch script
    cause: str | None = None
    exclude: list[str] = field(default_factory=list)  # nodes to leave out from now on


def end(
    arguments: Sequence[str], nodes: Sequence[str], logs: Path, said: str, warned: bool, terminated: bool
) -> Verdict:
    """What the end of the training step means.

    Args:
        said: what ``scontrol show job`` and ``scontrol show node`` print.
        warned: the batch script was told that the time limit is near.
        terminated: the batch script was told to end.
    """
    config, _, _ = _load(arguments)
    run_dir = Path(config.run_dir).expanduser()
    start, events, step = _this_start(), history(run_dir), committed_step(run_dir)
    verdict = _judge(run_dir, start, nodes, logs, said, warned, terminated, step)
    if verdict.cause == TIME_LIMIT and "LIFTDIST_NEXT" in os.environ:
        verdict = Verdict("nothing", f"{verdict.message}; the next job of the chain goes on", configs.EXIT_STOPPED)
    if verdict.action == "requeue":
        assert verdict.cause is not None
        problem = refusal(config, events, start["family"], verdict.cause, step)
        if problem:
            verdict = replace(verdict, action="fail", message=f"{verdict.message}; not requeued: {problem}")
    elif verdict.action == "restart":
        in_a_row = [e for e in events if e.get("action") == "restart" and e["family"] == start["family"]]
        if sum(event["step"] == step for event in in_a_row) >= config.slurm.max_restarts:
            verdict = replace(verdict, action="fail")
    if verdict.exclude:  # besides those that were left out before
        known = scheduler.fields(said).get("ExcNodeList", "(null)")
        verdict = replace(verdict, exclude=[*([known] if known != "(null)" else []), *verdict.exclude])
    fields = dict(cause=verdict.cause, action=verdict.action, step=step, message=verdict.message)
    note(run_dir, "end", **start, **fields, exclude=verdict.exclude)
    return verdict


def _judge(
    run_dir: Path,
    start: Event,
    nodes: Sequence[str],
    logs: Path,
    said: str,
    warned: bool,
    terminated: bool,
    step: int,
) -> Verdict:
    outcome = _outcome(run_dir, start)
    found = failures.read(logs)
    if outcome == "finished":
        return Verdict("done", f"finished at step {step}", 0)
    known = scheduler.fields(said)
    time_limit = Verdict("requeue", f"time limit, saved step {step}", 1, TIME_LIMIT)
    if "JobState" not in known:  # this node may be the one that is cut off, and the job run elsewhere by now
        if outcome == "stopped" and warned and not terminated:
            return time_limit
        return Verdict("nothing", f"SLURM does not answer at step {step}, and decides by itself", 1)
    if int(known.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        lost = silent_nodes(nodes, logs, said)
        without = f" without {', '.join(lost)}" if lost else ""
        return Verdict("nothing", f"requeued by SLURM at step {step}{without}", 0, NODE_FAILURE if lost else None, lost)
    if found and found[0].kind == failures.USER_ERROR:
        return Verdict("fail", found[0].error, configs.EXIT_USER_ERROR)
    if known.get("PreemptTime", "None") not in ("None", "Unknown"):
        return Verdict("requeue", f"preempted, saved step {step}", 1, PREEMPTED)
    crashed = outcome != "stopped" and bool(found) and found[0].kind == failures.BUG
    if not crashed:
        silent = [] if outcome == "stopped" else silent_nodes(nodes, logs, said)
        if silent:
            return Verdict("requeue", f"lost {', '.join(silent)} at step {step}", 1, NODE_FAILURE, silent)
        if _is_over(known) if terminated else warned:
            return time_limit
        if terminated:
            return Verdict("nothing", f"cancelled, saved step {step}", 1)
        if outcome == "stopped":
            return Verdict("fail", f"stopped as asked, saved step {step}", configs.EXIT_STOPPED)
    summary = failures.summary(found) or launcher.last_words(sorted(logs.glob("node-*.torchrun.log")))
    return Verdict("restart", summary, 1)


def _outcome(run_dir: Path, start: Event) -> str | None:
    """How the newest attempt at the run by this start of the job ended, by its own word."""
    attempts = rundir.attempts(run_dir)
    claim, *others = attempts[max(attempts)] if attempts else [{}]
    job = claim.get("job") or {}
    if job.get("id") != f"slurm {os.environ['SLURM_JOB_ID']}" or job.get("time") != start["start"]:
        return None
    return next((event["outcome"] for event in others if event.get("event") == "end"), None)


def _is_over(said: Mapping[str, str]) -> bool:
    """Whether the job's time limit has passed."""
    limit = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", said.get("TimeLimit", ""))
    try:
        began = datetime.fromisoformat(said.get("StartTime", "")).timestamp()
    except ValueError:
        return False
    if limit is None:
        return False
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    return time.time() >= began + 86400 * days + 3600 * hours + 60 * minutes + seconds - 1


def silent_nodes(nodes: Sequence[str], logs: Path, said: str) -> list[str]:
    """Nodes that are gone: not heard of, out of reach, or down by SLURM's word."""
    gone = {name for name, problem in _preflight_problems(logs) if problem}
    with contextlib.suppress(FileNotFoundError):
        gone.update(_unheard(nodes, logs, (logs / "now").stat().st_mtime))  # touched when the training step ended
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


def _unheard(nodes: Sequence[str], logs: Path, now: float | None = None) -> list[str]:
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


def _preflight_problems(logs: Path) -> list[tuple[str, str]]:
    try:
        return [(name, problem) for name, problem in json.loads((logs / PROBLEMS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


# ---------------------------------------------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> None:
    """``python -m liftdist.job begin | check | end | again``, for the batch script: the answer is words with a null byte each."""
    command, *rest = sys.argv[1:] if given is None else given
    nodes = os.environ["LIFTDIST_NODES"].split()
    try:
        if command == "begin":
            answer = begin(rest, nodes)
        elif command == "check":
            answer = []
            logs = Path(os.environ[failures.LOGS])
            if problems := check(nodes, logs, os.environ["LIFTDIST_HEAD"]):
                files.write(logs / PROBLEMS, json.dumps(problems))
                print(*(f"liftdist: {name}: {problem}" for name, problem in problems), sep="\n", file=sys.stderr)
                sys.exit(1)
        elif command == "end":
            warned, terminated, *arguments = rest
            logs, said = Path(os.environ[failures.LOGS]), sys.stdin.read()
            verdict = end(arguments, nodes, logs, said, bool(warned), bool(terminated))
            print(f"liftdist: {verdict.message}", file=sys.stderr)
            if verdict.action == "restart":
                print("liftdist: starting again from the newest checkpoint", file=sys.stderr)
            first, *_ = verdict.message.splitlines()
            comment = re.sub(r"[^\w .,:()/=-]", "?", f"liftdist: {first}", flags=re.ASCII)[:200]
            answer = [verdict.action, str(verdict.code), comment, ",".join(verdict.exclude)]
        else:
            exclude, script, *arguments = rest
            answer = scheduler.again(sys.stdin.read(), exclude, script, arguments, os.environ["LIFTDIST_LEAD"])
    except UserError as error:
        text = configs.redact(str(error))
        print(f"liftdist: {text}", file=sys.stderr)
        if command == "check" and not int(os.environ["SLURM_NODEID"]):
            failed = failures.Failure(0, 0, platform.node(), time.time(), text, kind=failures.USER_ERROR)
            failures.write(Path(os.environ[failures.LOGS]), failed)
        sys.exit(configs.EXIT_USER_ERROR)
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in answer))


if __name__ == "__main__":
    main()
