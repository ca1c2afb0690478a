"""SLURM's commands as argument vectors, and how their output is read.

Imports no torch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liftdist import environment as env
from liftdist import files
from liftdist.cluster import commands
from liftdist.errors import UserError
from liftdist.schema import Config
from liftdist.slurm_settings import NAME, SlurmConfig

ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "PREEMPTED",
)
ARRAY = r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?"
_AFTER = r"(singleton|after(any|ok|notok|corr|burstbuffer)?(:\d+(_\d+)?(\+\d+)?)+)"
DEPENDENCY = rf"{_AFTER}([,?]{_AFTER})*"


@dataclass(frozen=True)
class Job:
    id: str  # of an array task: 12_3
    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state.startswith(ENDED)


# ---------------------------------------------------------------------------------------------------------------------
# Submitting.


def sbatch(
    config: Config, arguments: Sequence[str], name: str, log: Path, array: str | None, dependency: str | None
) -> list[str]:
    """The command that submits a run.

    Args:
        arguments: of the batch script.
        log: folder for the job's output.

    Raises:
        UserError: a name, path or dependency that SLURM does not take as it is.
    """
    slurm = config.slurm
    for what, given, pattern in (
        ("--job-name", name, NAME),
        ("--array", array, ARRAY),
        ("--dependency", dependency, DEPENDENCY),
    ):
        if given is not None and not re.fullmatch(pattern, given, re.ASCII):
            raise UserError(f"{what} {given!r}: is not of a form that SLURM takes")
    options = _named(
        {
            "job-name": name,
            "nodes": slurm.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": slurm.cpus_per_task,
            "gpus-per-node": slurm.gpus_per_node,
            "time": slurm.time,
            "partition": slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "exclude": slurm.exclude,
            "array": array,
            "dependency": dependency,
            "export": "ALL",
            "open-mode": "append",
            "output": _pattern(log / ("slurm-%A_%a.out" if array else "slurm-%j.out")),
            "signal": f"B:USR1@{slurm.signal_lead}",
        }
    )
    script = str(files.shipped("slurm/train.sbatch"))
    return [*_SBATCH, "--requeue", *options, *slurm.options, script, *container(slurm), *arguments]


_ONCE = ("--begin", "--comment", "--dependency")  # options that are not for a job that continues another


def again(
    scontrol_output: str,
    exclude: str,
    batch_script: str,
    arguments: Sequence[str],
    lead: str,
    further: Sequence[str] = (),
) -> list[str]:
    """The command that submits a running job once more, where it may not be requeued.

    Args:
        scontrol_output: what ``scontrol show job`` prints about it.
        further: ``slurm.options``.
    """
    options = _named(
        {
            "job-name": env.SLURM_JOB_NAME.need(),
            "nodes": env.SLURM_JOB_NUM_NODES.need(),
            "ntasks-per-node": 1,
            "cpus-per-task": env.SLURM_CPUS_PER_TASK.get(),
            "gpus-per-node": env.SLURM_GPUS_PER_NODE.get() or env.SLURM_GPUS_ON_NODE.get(),
            "mem": env.SLURM_MEM_PER_NODE.get(),
            "time": fields(scontrol_output).get("TimeLimit"),
            "partition": env.SLURM_JOB_PARTITION.get(),
            "account": env.SLURM_JOB_ACCOUNT.get(),
            "qos": env.SLURM_JOB_QOS.get(),
            "reservation": env.SLURM_JOB_RESERVATION.get(),
            "constraint": fields(scontrol_output).get("Features"),
            "exclude": exclude or None,
            "array": env.SLURM_ARRAY_TASK_ID.get(),
            "comment": f"liftdist: continues job {env.SLURM_JOB_ID.need()}",  # by which it is found
            "dependency": f"afterany:{env.SLURM_JOB_ID.need()}",
            "export": "ALL",
            "open-mode": "append",
            "output": _pattern(Path(fields(scontrol_output).get("StdOut", "liftdist.out"))),
            "signal": f"B:USR1@{lead}",
        }
    )
    kept = [option for option in further if option.partition("=")[0] not in _ONCE]
    return ["env", f"--unset={env.SLURM_RESTART_COUNT.name}", *_SBATCH, *options, *kept, batch_script, *arguments]


_SBATCH = ("sbatch", "--parsable")


def _named(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value not in (None, "", "(null)")]


def container(slurm: SlurmConfig) -> list[str]:
    """The options of the batch script for a container."""
    mounts = ["--mounts", ",".join(slurm.container_mounts)] if slurm.container_mounts else []
    return [f"--{slurm.container_runtime}", slurm.container, *mounts] if slurm.container else []


def _pattern(path: Path) -> str:
    """``path`` as SLURM's pattern of a file name: only the last part may hold ``%``. Raises ``UserError``."""
    folder = str(path.parent.absolute())
    if "\\" in str(path) or "\n" in str(path):
        raise UserError(f"run_dir {folder!r}: SLURM takes no path with a backslash or a newline")
    return f"{folder.replace('%', '%%')}/{path.name}"


def test_only(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ``UserError`` if SLURM would never start the job that ``command`` submits; it would stay in the queue forever."""
    done = commands.ask([command[0], "--test-only", *command[1:]], environment)
    if done.returncode:
        raise UserError(f"sbatch: {commands.reason(done)}")


# ---------------------------------------------------------------------------------------------------------------------
# Asking.


def fields(scontrol_output: str) -> dict[str, str]:
    """The fields of one job by ``scontrol show job``, the first of each name. Where a user may write what
    he likes, the rest of the line does not count."""
    found: dict[str, str] = {}
    for line in scontrol_output.split("\n"):
        free = re.match(r"\s*(Comment|Command|WorkDir|Std(?:Out|Err|In)|AdminComment|SystemComment|Extra)=(.*)", line)
        if free:
            found.setdefault(free[1], free[2])
        else:
            known = re.split(r" (?:JobName|WCKey|Network)=", line)[0]
            for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", known):
                found.setdefault(key, value)
    return found


def jobs(ids: Iterable[str], patience: float | None = None) -> list[Job]:
    """The state of these jobs, and of each task of those that are arrays: by the first of ``squeue``, ``sacct`` and ``scontrol``
    that knows each. Jobs that none knows are left out: they ended long ago.

    Raises:
        Unknown: SLURM does not answer about some of them.
    """
    wanted, found = list(dict.fromkeys(ids)), list[Job]()
    problem: UserError | None = None
    for ask_about in (_squeue, _sacct, _scontrol):
        known = {name for job in found for name in (job.id, job.id.partition("_")[0])}
        missing = [id for id in wanted if id not in known]
        if not missing or (problem and ask_about is _scontrol):  # which asks the same daemon as squeue
            continue
        try:
            found += ask_about(missing, patience)
        except commands.NoAnswer as error:
            problem = error
    known = {name for job in found for name in (job.id, job.id.partition("_")[0])}
    if problem and not known.issuperset(wanted):
        raise Unknown(str(problem), found)
    return found


class Unknown(commands.NoAnswer):
    """SLURM does not answer about some jobs; ``jobs`` are those whose state is known."""

    def __init__(self, message: str, jobs: list[Job]) -> None:
        super().__init__(message)
        self.jobs = jobs


def _squeue(ids: Sequence[str], patience: float | None) -> list[Job]:
    form = "--format=%F|%K|%T|%N|%r"
    done = commands.ask(
        ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", form], None, patience
    )
    _check_answered(done)
    return parse_table(done.stdout)


def _sacct(ids: Sequence[str], _: float | None) -> list[Job]:
    """Of another daemon than the others, and not everywhere: no answer is none."""
    form = "--format=JobID,State,NodeList"
    try:
        done = commands.run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}", form])
    except UserError:
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = (re.fullmatch(r"(\d+(?:_\d+)?)\|([A-Z_]+)[^|]*\|([^|]*)", line.strip(), re.ASCII) for line in lines)
    return [Job(row[1], row[2], row[3]) for row in rows if row]


def _scontrol(ids: Sequence[str], patience: float | None) -> list[Job]:
    found = []
    for id in ids:
        done = commands.ask(["scontrol", "show", "job", id], None, patience)
        _check_answered(done)
        for block in re.split(r"\n\s*\n", done.stdout):
            job = fields(block)
            if "JobState" in job:
                task = f"{job['ArrayJobId']}_{job.get('ArrayTaskId')}" if "ArrayJobId" in job else job["JobId"]
                found.append(Job(task, job["JobState"], job.get("NodeList", ""), job.get("Reason", "")))
    return found


def _check_answered(done: subprocess.CompletedProcess[str]) -> None:
    """Raises ``NoAnswer`` unless SLURM has told of jobs, or that it does not know them."""
    if done.returncode and not re.search(r"Invalid job id|Job \S+ not found", done.stderr + done.stdout):
        raise commands.NoAnswer(f"SLURM does not answer: {done.args[0]}: {commands.reason(done)}")


def parse_table(text: str) -> list[Job]:
    """``squeue --format=%F|%K|%T|%N|%r``, one job or array task a line; lines of another form are a site's own."""
    rows = re.findall(r"^(\d+)\|([^|\n]*)\|([A-Z_]+)\|([^|\n]*)\|(.*)$", text, re.M | re.ASCII)
    return [Job(f"{id}_{task}" if task.isdigit() else id, *rest) for id, task, *rest in rows]


def seconds(text: str) -> int | None:
    """A time as SLURM writes it: ``minutes``, ``[hours:]minutes:seconds``, ``days-hours[:minutes[:seconds]]``. None: no limit."""
    days, dash, clock = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", clock) or (dash and not days.isdigit()):
        return None
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, minutes, rest = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + rest


def node_names(nodelist: str) -> list[str]:
    """The names in SLURM's short form, ``node[1-3,7]``. Raises ``UserError``."""
    done = commands.ask(["scontrol", "show", "hostnames", nodelist])
    if done.returncode:
        raise UserError(f"nodes {nodelist}: {commands.reason(done)}")
    return done.stdout.split()
