"""Decisions of a SLURM job: where it begins, which of its nodes can be used, and whether it is requeued, restarted or failed.

    begin -> check, on every node -> training -> end: done, requeue, restart, fail, or nothing because SLURM or a user acts

``slurm/train.sbatch`` runs these three and does what they say. No exit code of a rank decides anything: what counts is what the
run directory holds, what SLURM says of job and nodes, and which nodes sent heartbeats.

Runs no command of SLURM, so that it works inside a container, and imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from liftdist import config as configs
from liftdist import environment, failures, files, network, output, preflight, processes
from liftdist.cluster import health, history, launcher, scheduler
from liftdist.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from liftdist.options import allowed_by, split_arguments
from liftdist.redaction import redact
from liftdist.runs import changes, claims, layout
from liftdist.schema import Config

SUBMITTED = "submitted"  # how the name of a config begins that `liftdist submit` keeps for a job

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
    words, _ = split_arguments(rest)
    if not words:
        return rest
    chosen = values[index] if options.sweep else []
    _check_kept(Path(words[0]))
    config, _ = configs.load(words[0], [*words[1:], *chosen])
    name = "-".join([str(index), *(re.sub(r"[^A-Za-z0-9=._-]", "_", value) for value in chosen)])
    return [*rest, *chosen, configs.override("run_dir", str(Path(config.run_dir) / name))]


def sweep(given: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of a sweep: ``["a=1,2", "b=3,4"]`` has four."""
    axes = []
    for text in given:
        key, equals, values = text.partition("=")
        if key == "run_dir" or key.startswith("slurm."):
            raise UserError(f"--sweep {text!r}: all tasks of an array are alike in {key}")
        if not key or not equals or not values or "" in values.split(","):
            raise UserError(f"--sweep {text!r}: expected key=a,b,c")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def _options(arguments: Sequence[str]) -> list[str]:
    """``slurm.options`` of the job that was submitted with ``arguments``, those of a container first."""
    rest = list(arguments)
    while rest and rest[0] in ("--pyxis", "--apptainer", "--mounts"):
        del rest[:2]
    config, _, _ = _load(of_task(rest, environment.SLURM_ARRAY_TASK_ID.get()))
    return config.slurm.options


def _load(arguments: Sequence[str]) -> tuple[Config, str, set[str]]:
    words, flags = split_arguments(arguments)
    if not words:
        raise UserError("slurm/train.sbatch: needs a config")
    _check_kept(Path(words[0]))
    config, text = configs.load(words[0], words[1:])
    return config, text, allowed_by(flags)


def _check_kept(path: Path) -> None:
    """Raises ``UserError`` if ``path`` is a config that was kept for this job, and has become a symbolic link."""
    submitted = path.parent.name == layout.LOGS and path.name.startswith(f"{SUBMITTED}-")
    if submitted or path.parent == environment.LOGS.get():
        try:
            files.open_to_read(path).close()
        except OSError as error:
            raise UserError(f"config {files.reason(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The beginning.


def begin(arguments: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Check what can be checked, choose a port, and note the start.

    Returns:
        Run directory, folder of logs, ``HOST:PORT`` of the head, then the arguments for the launcher.

    Raises:
        UserError: as ``liftdist train``; the job before this one failed; SLURM requeued the job too often.
    """
    resolved = of_task(arguments, environment.SLURM_ARRAY_TASK_ID.get())
    config, text, allowed = _load(resolved)
    run_dir = Path(config.run_dir).expanduser()
    changes.check_settings(config, text, allowed)
    start, step = history.this_start(), history.committed_step(run_dir)
    try:
        _check_before(history.read(run_dir))
        _check_requeued(config, run_dir, start, step)
        preflight.check(config, ranks_per_node(config) * len(nodes), training=True)
    except UserError as error:
        if os.path.lexists(run_dir / history.JOBS):  # jobs that wait for this one read it there
            history.note(run_dir, "end", **start, cause=None, action="fail", step=step, message=str(error))
        raise
    head = network.outgoing_address(network.resolve(nodes[1])) if len(nodes) > 1 else "127.0.0.1"
    port = network.free_port(int(environment.SLURM_JOB_ID.need()) * 7)
    logs = layout.logs(run_dir, history.start_name(start))
    try:
        for path in logs.iterdir():  # of another cluster, where a job had this number
            path.unlink()
    except OSError as error:
        raise UserError(f"{files.reason(error)}; remove it") from None
    given = split_arguments(resolved)[0][0]
    kept = logs / "config.yaml"  # edits of the file from now on are meant for other runs
    files.write(kept, Path(given).read_text())
    resolved[resolved.index(given)] = str(kept)
    output = str(Path("/proc/self/fd/2").readlink())
    history.note(
        run_dir, "start", **start, nodes=list(nodes), step=step, log=output if output.startswith("/") else None
    )
    return [str(run_dir), str(logs), f"[{head}]:{port}" if ":" in head else f"{head}:{port}", *resolved]


def ranks_per_node(config: Config) -> int:
    """Ranks that each node starts: as set, or one for each GPU."""
    gpus = environment.SLURM_GPUS_ON_NODE.get("")
    return config.slurm.ranks_per_node or (int(gpus) if gpus.isdigit() and int(gpus) else 1)


def _check_before(events: Sequence[history.Event]) -> None:
    before = environment.AFTER_JOB.get()
    ends = [event for event in events if event["event"] == "end" and event["job"] == before]
    if ends and ends[-1]["action"] == "fail":
        raise UserError(f"job {before}, before this one, failed: {ends[-1]['message']}; this one does not try again")


def _check_requeued(config: Config, run_dir: Path, start: history.Event, step: int) -> None:
    """Where SLURM requeued the job by itself: bound that, too.

    A start that could not note its end was killed with its node, or preempted without warning.
    """
    events = history.read(run_dir)
    mine = [event for event in events if event.get("job") == start["job"] and event["event"] in ("start", "end")]
    if not mine:
        return
    last = mine[-1]
    before = [event for event in events if event is not last]
    if last["event"] == "start":
        missing = health.without_heartbeat(last["nodes"], layout.logs(run_dir, history.start_name(last)))
        of = f", {', '.join(missing)} first" if missing else ""
        message = f"ended without a message at step {step}{of}: a node was lost, or the job was killed"
        lost = {key: last[key] for key in ("job", "start", "family")}
        history.note(run_dir, "end", **lost, cause=history.NODE_FAILURE, action="nothing", step=step, message=message)
        print(f"liftdist: start {history.start_name(last)} {message}", file=sys.stderr)
    elif last["action"] != "nothing" or last["cause"] != history.NODE_FAILURE:
        return
    if problem := history.refusal(config, before, start["family"], history.NODE_FAILURE, step):
        raise UserError(f"requeued by SLURM after a node was lost; {problem}")


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
    arguments: Sequence[str], nodes: Sequence[str], logs: Path, scontrol_output: str, warned: bool, terminated: bool
) -> Verdict:
    """What the end of the training step means.

    Args:
        scontrol_output: what ``scontrol show job`` and ``scontrol show node`` print.
        warned: the batch script was warned of the time limit.
        terminated: the batch script was asked to end.
    """
    config, _, _ = _load(arguments)
    run_dir = Path(config.run_dir).expanduser()
    start, events, step = history.this_start(), history.read(run_dir), history.committed_step(run_dir)
    verdict = _judge(run_dir, start, nodes, logs, scontrol_output, warned, terminated, step)
    if verdict.action == "requeue":
        assert verdict.cause is not None
        problem = history.refusal(config, events, start["family"], verdict.cause, step)
        if problem:
            verdict = replace(verdict, action="fail", message=f"{verdict.message}; not requeued: {problem}")
    elif verdict.action == "restart":
        in_a_row = [e for e in events if e.get("action") == "restart" and e["family"] == start["family"]]
        if sum(event["step"] == step for event in in_a_row) >= config.slurm.max_restarts:
            verdict = replace(verdict, action="fail")
    if verdict.exclude:  # besides those that were left out before
        known = scheduler.fields(scontrol_output).get("ExcNodeList", "(null)")
        verdict = replace(verdict, exclude=[*([known] if known != "(null)" else []), *verdict.exclude])
    fields = dict(cause=verdict.cause, action=verdict.action, step=step, message=verdict.message)
    history.note(run_dir, "end", **start, **fields, exclude=verdict.exclude)
    return verdict


def _judge(
    run_dir: Path,
    start: history.Event,
    nodes: Sequence[str],
    logs: Path,
    scontrol_output: str,
    warned: bool,
    terminated: bool,
    step: int,
) -> Verdict:
    outcome = _outcome(run_dir, start)
    found = failures.read(logs)
    if outcome == "finished":
        return Verdict("done", f"finished at step {step}", 0)
    known = scheduler.fields(scontrol_output)
    saved = f"saved step {step}" if step else "before anything was saved"
    time_limit = Verdict("requeue", f"time limit, {saved}", 1, history.TIME_LIMIT)
    if "JobState" not in known:  # this node may be the one that is cut off, and the job run elsewhere by now
        if outcome == "stopped" and warned and not terminated:
            return time_limit
        return Verdict("nothing", f"SLURM does not answer at step {step}, and decides by itself", 1)
    if int(known.get("Restarts", 0)) > environment.SLURM_RESTART_COUNT.get(0):
        lost = health.lost(nodes, logs, scontrol_output)
        without = f" without {', '.join(lost)}" if lost else ""
        return Verdict(
            "nothing", f"requeued by SLURM at step {step}{without}", 0, history.NODE_FAILURE if lost else None, lost
        )
    if found and found[0].kind == failures.USER_ERROR:
        return Verdict("fail", found[0].error, EXIT_USER_ERROR)
    if known.get("PreemptTime", "None") not in ("None", "Unknown"):
        return Verdict("requeue", f"preempted, {saved}", 1, history.PREEMPTED)
    crashed = outcome != "stopped" and bool(found) and found[0].kind == failures.BUG
    if not crashed:
        lost_nodes = [] if outcome == "stopped" else health.lost(nodes, logs, scontrol_output)
        if lost_nodes:
            return Verdict(
                "requeue", f"lost {', '.join(lost_nodes)} at step {step}", 1, history.NODE_FAILURE, lost_nodes
            )
        if _is_over(known) if terminated else warned:
            return time_limit
        if terminated:
            return Verdict("nothing", f"cancelled, {saved}", 1)
        if outcome == "stopped":
            return Verdict("fail", f"stopped as asked, {saved}", EXIT_STOPPED, history.ASKED)
    reports = sorted(logs.glob("node-*.torchrun.log"))
    nothing = "no rank was started: what srun or the check of the nodes printed is in the log"
    summary = failures.summary(found) or (launcher.last_words(reports) if reports else nothing)
    return Verdict("restart", summary, 1)


def _outcome(run_dir: Path, start: history.Event) -> str | None:
    """How the newest attempt at the run by this start of the job ended, as it recorded itself."""
    attempts = claims.attempts(run_dir)
    claim, *others = attempts[max(attempts)] if attempts else [{}]
    job = claim.get("job")
    if not isinstance(job, dict) or job.get("id") != f"slurm {environment.SLURM_JOB_ID.need()}":
        return None
    if job.get("time") != start["start"]:
        return None
    ends = (event for event in others if isinstance(event, dict) and event.get("event") == "end")
    return next((event.get("outcome") for event in ends), None)


def _is_over(job: Mapping[str, str]) -> bool:
    """Whether the job's time limit has passed."""
    limit = scheduler.seconds(job.get("TimeLimit", ""))
    try:
        began = datetime.fromisoformat(job.get("StartTime", "")).timestamp()
    except ValueError:
        return False
    return limit is not None and time.time() >= began + limit - 1


# ---------------------------------------------------------------------------------------------------------------------


def main(given: Sequence[str] | None = None) -> None:
    """``python -m liftdist.cluster.job begin | check | end | again``.

    For the batch script: the answer is words with a null byte each; where the command fails, it is the reason."""
    if given is None:
        processes.use_utf8()
        output.take_over(patient=True)
    command, *rest = sys.argv[1:] if given is None else given
    nodes = environment.NODES.need()
    answer: list[str] = []
    try:
        if command == "begin":
            answer = begin(rest, nodes)
        elif command == "check":
            _check_nodes(nodes, environment.LOGS.need())
        elif command == "end":
            warned, terminated, *arguments = rest
            verdict = end(arguments, nodes, environment.LOGS.need(), sys.stdin.read(), bool(warned), bool(terminated))
            print(f"liftdist: {verdict.message}", file=sys.stderr)
            if verdict.action == "restart":
                print("liftdist: starting again from the newest checkpoint", file=sys.stderr)
            answer = [verdict.action, str(verdict.code), _comment(verdict.message), ",".join(verdict.exclude)]
        else:
            exclude, script, *arguments = rest
            lead = f"{environment.LEAD.need():.0f}"
            answer = scheduler.again(sys.stdin.read(), exclude, script, arguments, lead, _options(arguments))
    except UserError as error:
        text = redact(str(error))
        print(f"liftdist: {text}", file=sys.stderr)
        if command == "check":
            _record(text, failures.USER_ERROR)
        else:
            _answer([_comment(text).removeprefix("liftdist: ")])
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        if command != "check":
            _answer([_comment(redact(f"{type(error).__name__}: {error}")).removeprefix("liftdist: ")])
        raise
    _answer(answer)
    if (problem := output.lost()) is not None:
        print(f"liftdist: the batch script cannot be answered: {problem.strerror}", file=sys.stderr)
        sys.exit(1)


def _answer(words: Sequence[str]) -> None:
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    sys.stdout.buffer.flush()


def _comment(message: str) -> str:
    """The first line of a message, as the comment of a job."""
    return re.sub(r"[^\w .,:()/=-]", "?", f"liftdist: {message.partition(chr(10))[0]}", flags=re.ASCII)[:200]


def _check_nodes(nodes: Sequence[str], logs: Path) -> None:
    """Ends with code 1 where nodes are not fit. Raises ``UserError``."""
    secret = environment.SECRET.get()
    if secret is None:
        print(
            "liftdist: the batch script is older than liftdist: nodes are not checked before ranks start",
            file=sys.stderr,
        )
        return
    try:
        problems = health.check(nodes, logs, environment.HEAD.need(), secret)
    except OSError as error:  # the next start takes another port
        _record(f"the nodes cannot be checked: {error}", failures.BUG)
        raise
    if problems:
        files.write(logs / health.PROBLEMS, json.dumps(problems))
        print(*(f"liftdist: {name}: {problem}" for name, problem in problems), sep="\n", file=sys.stderr)
        sys.exit(1)


def _record(text: str, kind: int) -> None:
    """On the head: leave what ended the check for the batch script to find."""
    if not environment.SLURM_NODEID.need():
        failed = failures.Failure(0, 0, platform.node(), time.time(), text, kind=kind)
        failures.write(environment.LOGS.need(), failed)


if __name__ == "__main__":
    main()
