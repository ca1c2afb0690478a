"""SLURM's commands as argument vectors, and how their output is read. User input never reaches a shell.

Imports no torch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from liftdist import environment as env
from liftdist.errors import UserError
from liftdist.schema import NAME, Config, SlurmConfig

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
_TIMEOUT = 60  # seconds for an answer of SLURM's


@dataclass(frozen=True)
class Job:
    id: str  # of an array task: 12_3
    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        return self.state.startswith(ENDED)


def script() -> Path:
    """``slurm/train.sbatch``: beside the package in a checkout, inside it when installed. Raises ``UserError``."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package, package.parent):
        if (folder / "slurm" / "train.sbatch").is_file():
            return folder / "slurm" / "train.sbatch"
    raise UserError(f"slurm/train.sbatch is missing beside {package}: install liftdist again")


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
    return [*_SBATCH, "--requeue", *options, *slurm.options, str(script()), *container(slurm), *arguments]


def again(scontrol_output: str, exclude: str, batch_script: str, arguments: Sequence[str], lead: str) -> list[str]:
    """The command that submits a running job once more, where it may not be requeued.

    Args:
        scontrol_output: what ``scontrol show job`` prints about it.
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
            "dependency": f"afterany:{env.SLURM_JOB_ID.need()}",
            "export": "ALL",
            "open-mode": "append",
            "output": _pattern(Path(fields(scontrol_output).get("StdOut", "liftdist.out"))),
            "signal": f"B:USR1@{lead}",
        }
    )
    return ["env", f"--unset={env.SLURM_RESTART_COUNT.name}", *_SBATCH, *options, batch_script, *arguments]


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


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's. Raises ``UserError``: there is none, or it does not answer."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT, env=environment, errors="replace"
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; this is no machine of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {_TIMEOUT} s") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{command[0]}: {error}") from None


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The id of the job that ``command`` submits. Raises ``UserError`` with SLURM's reason."""
    done = run(command, environment)
    id = done.stdout.strip().partition(";")[0]  # a cluster's name may follow
    if done.returncode or not id.isdigit():
        raise UserError(f"sbatch: {_reason(done.stderr)}")
    return id


def test_only(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises ``UserError`` if SLURM would never start the job that ``command`` submits; it would stay in the queue forever."""
    done = run([command[0], "--test-only", *command[1:]], environment)
    if done.returncode:
        raise UserError(f"sbatch: {_reason(done.stderr)}")


def _reason(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines() if line.strip()]
    return "; ".join(lines) or "failed without a message"


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


def jobs(ids: Iterable[str]) -> list[Job]:
    """The state of these jobs, and of each task of those that are arrays: by the first of ``squeue``, ``sacct`` and ``scontrol``
    that knows each.

    Raises:
        UserError: SLURM does not answer.
    """
    found: list[Job] = []
    problem: str | None = None
    for ask in (_squeue, _sacct, _scontrol):
        known = {name for job in found for name in (job.id, job.id.partition("_")[0])}
        for id in dict.fromkeys(ids):
            if id in known or (problem and ask is not _sacct):  # which asks another daemon than the others
                continue
            done, jobs_of = ask(id)
            found += jobs_of
            unknown = re.search(r"Invalid job id|Job \S+ not found", done.stderr + done.stdout)
            if done.returncode and not unknown and ask is not _sacct:  # which may be switched off
                problem = _reason(done.stderr)
    if problem and not found:
        raise UserError(f"SLURM does not answer: {problem}")
    return found


_Answer = tuple[subprocess.CompletedProcess[str], list[Job]]


def _squeue(id: str) -> _Answer:
    done = run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={id}", "--format=%F|%K|%T|%N|%r"])
    return done, parse_table(done.stdout)


def _sacct(id: str) -> _Answer:
    form = "--format=JobID,State,NodeList"
    done = run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={id}", form])
    rows = [line.split("|") for line in done.stdout.splitlines() if not done.returncode]
    return done, [Job(row[0], row[1].split()[0], row[2]) for row in rows if len(row) == 3 and row[1]]


def _scontrol(id: str) -> _Answer:
    found = []
    done = run(["scontrol", "show", "job", id])
    for block in re.split(r"\n\s*\n", done.stdout):
        job = fields(block)
        if "JobState" in job:
            task = f"{job['ArrayJobId']}_{job.get('ArrayTaskId')}" if "ArrayJobId" in job else job["JobId"]
            found.append(Job(task, job["JobState"], job.get("NodeList", ""), job.get("Reason", "")))
    return done, found


def parse_table(text: str) -> list[Job]:
    """``squeue --format=%F|%K|%T|%N|%r``, one job or array task a line."""
    found = []
    for line in text.splitlines():
        id, task, state, nodes, reason = line.split("|", 4)
        found.append(Job(f"{id}_{task}" if task.isdigit() else id, state, nodes, reason))
    return found


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
    done = run(["scontrol", "show", "hostnames", nodelist])
    if done.returncode:
        raise UserError(f"nodes {nodelist}: {done.stderr.strip()}")
    return done.stdout.split()
