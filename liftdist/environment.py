"""Environment variables that mean something: one typed table, from which the guide is generated.

    environment.LOCAL_RANK.get(0)        the value with its type, or what to take where it is unset
    environment.SLURM_JOB_ID.need()      the value; UserError where it is unset
    {environment.HEAD.name: "host:29400"}

What users may set has ``by="user"``; all others are set by torchrun, by SLURM, or by one part of liftdist for another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, overload

from liftdist.errors import UserError

T = TypeVar("T")
D = TypeVar("D")
Environ = Mapping[str, str]


@dataclass(frozen=True)
class Variable(Generic[T]):
    """A variable, how its text is read, who sets it, and what it means."""

    name: str
    kind: Callable[[str], T]
    by: str
    meaning: str

    @overload
    def get(self, default: D, environ: Environ | None = None) -> T | D: ...
    @overload
    def get(self, default: None = None, environ: Environ | None = None) -> T | None: ...
    def get(self, default: D | None = None, environ: Environ | None = None) -> T | D | None:
        """The value, or ``default`` where it is unset or empty. Raises ``UserError`` for a text of another form."""
        text = (os.environ if environ is None else environ).get(self.name, "")
        if not text:
            return default
        try:
            return self.kind(text)
        except ValueError:
            raise UserError(
                f"environment variable {self.name}={text!r}: is not of the form that {self.by} gives it"
            ) from None

    def need(self, environ: Environ | None = None) -> T:
        """The value. Raises ``UserError`` where it is unset."""
        value = self.get(None, environ)
        if value is None:
            raise UserError(f"environment variable {self.name} is not set; {self.by} sets it ({self.meaning})")
        return value

    def is_set(self, environ: Environ | None = None) -> bool:
        return self.name in (os.environ if environ is None else environ)


def _words(text: str) -> list[str]:
    return text.split()


def _command(text: str) -> list[str]:
    return [str(word) for word in json.loads(text)]


def _commits(text: str) -> dict[str, str]:
    return {str(name): str(commit) for name, commit in json.loads(text).items()}


TORCHRUN, SLURM, USER, LAUNCHER, SCRIPT, SUBMIT = (
    "torchrun", "SLURM", "user", "liftdist train", "slurm/train.sbatch", "liftdist submit",
)  # fmt: skip

# Ranks, by torchrun.
RANK = Variable("RANK", int, TORCHRUN, "number of this process among all")
WORLD_SIZE = Variable("WORLD_SIZE", int, TORCHRUN, "number of all processes")
LOCAL_RANK = Variable("LOCAL_RANK", int, TORCHRUN, "number of this process on its machine, and of its GPU")
LOCAL_WORLD_SIZE = Variable("LOCAL_WORLD_SIZE", int, TORCHRUN, "number of processes on this machine")
AGENT_RUN_ID = Variable("TORCHELASTIC_RUN_ID", str, TORCHRUN, "identity of the rendezvous; set where there is an agent")
AGENT_RESTARTS = Variable("TORCHELASTIC_RESTART_COUNT", int, TORCHRUN, "times that the agent has restarted its ranks")
AGENT_MAX_RESTARTS = Variable("TORCHELASTIC_MAX_RESTARTS", int, TORCHRUN, "times that the agent may restart its ranks")

# From one part of liftdist to another.
COMMAND = Variable("LIFTDIST_COMMAND", _command, LAUNCHER, "the command as it was typed, as JSON, for `command.txt`")
COMMITS = Variable(
    "LIFTDIST_COMMITS", _commits, LAUNCHER, "commits that names on the hub stand for in this run, as JSON"
)
STARTED = Variable("LIFTDIST_STARTED", float, LAUNCHER, "when the command began; older requests to stop are not for it")
LAUNCH = Variable("LIFTDIST_LAUNCH", str, LAUNCHER, "identity of one start of torchrun on all nodes")
STATUS_FILE = Variable("LIFTDIST_STATUS_FILE", Path, LAUNCHER, "where a rank leaves its exit code")
AGENT = Variable("LIFTDIST_AGENT", int, LAUNCHER, "process of torchrun, which no rank outlives")
FAILURES = Variable("LIFTDIST_FAILURES", Path, LAUNCHER, "folder for records of ranks that failed")
LOGS = Variable("LIFTDIST_LOGS", Path, SCRIPT, "folder for the output of ranks and the reports of nodes")
START = Variable("LIFTDIST_START", str, SUBMIT, "the file by which a job runs the code that it was submitted with")
LEAD = Variable("LIFTDIST_LEAD", float, SUBMIT, "seconds from SLURM's warning to the time limit")
TRY = Variable("LIFTDIST_TRY", int, SCRIPT, "times that the batch script has restarted the ranks")
NODES = Variable("LIFTDIST_NODES", _words, SCRIPT, "names of the job's nodes")
HEAD = Variable("LIFTDIST_HEAD", str, SCRIPT, "address and port of the first node")
SECRET = Variable("LIFTDIST_SECRET", str, SCRIPT, "by which the nodes of one start know each other before ranks start")
AFTER_JOB = Variable("LIFTDIST_AFTER_JOB", str, SCRIPT, "the job that this one was submitted to continue")
FIRST_JOB = Variable("LIFTDIST_FIRST_JOB", str, SCRIPT, "the first of the jobs that continue each other")

# For users.
PYTHON = Variable(
    "LIFTDIST_PYTHON", str, USER, "the Python that has liftdist, for the batch script and launch/torchrun"
)
CONTAINER_PYTHON = Variable(
    "LIFTDIST_CONTAINER_PYTHON", str, USER, "the Python inside the container (default `python3`)"
)
PATIENCE = Variable(
    "LIFTDIST_PATIENCE", int, USER, "seconds for which SLURM is asked again where it does not answer (90; in a job 600)"
)
VLLM_API_KEY = Variable("VLLM_API_KEY", str, USER, "the key that the vLLM server of `eval.server` wants, if it does")
TEST_SLURM = Variable("LIFTDIST_TEST_SLURM", str, USER, "if set, tests that need SLURM fail where it is missing")
TEST_VLLM = Variable("LIFTDIST_TEST_VLLM", str, USER, "the `vllm` command, for tests that need a server")

# SLURM's.
SLURM_JOB_ID = Variable("SLURM_JOB_ID", str, SLURM, "the job")
SLURM_JOB_NAME = Variable("SLURM_JOB_NAME", str, SLURM, "its name")
SLURM_JOB_NUM_NODES = Variable("SLURM_JOB_NUM_NODES", int, SLURM, "its number of nodes")
SLURM_JOB_ACCOUNT = Variable("SLURM_JOB_ACCOUNT", str, SLURM, "its account")
SLURM_JOB_PARTITION = Variable("SLURM_JOB_PARTITION", str, SLURM, "its partition")
SLURM_JOB_QOS = Variable("SLURM_JOB_QOS", str, SLURM, "its quality of service")
SLURM_JOB_RESERVATION = Variable("SLURM_JOB_RESERVATION", str, SLURM, "its reservation")
SLURM_MEM_PER_NODE = Variable("SLURM_MEM_PER_NODE", str, SLURM, "its memory on each node")
SLURM_CPUS_PER_TASK = Variable("SLURM_CPUS_PER_TASK", int, SLURM, "its CPUs on each node")
SLURM_GPUS_PER_NODE = Variable("SLURM_GPUS_PER_NODE", str, SLURM, "its GPUs on each node, as they were asked for")
SLURM_GPUS_ON_NODE = Variable("SLURM_GPUS_ON_NODE", str, SLURM, "GPUs on this node, and a rank for each")
SLURM_RESTART_COUNT = Variable("SLURM_RESTART_COUNT", int, SLURM, "times that the job was requeued")
SLURM_ARRAY_JOB_ID = Variable("SLURM_ARRAY_JOB_ID", str, SLURM, "the array that the job is a task of")
SLURM_ARRAY_TASK_ID = Variable("SLURM_ARRAY_TASK_ID", int, SLURM, "its index in the array; a config may refer to it")
SLURM_STEP_ID = Variable("SLURM_STEP_ID", int, SLURM, "the step; set inside `srun`")
SLURM_STEP_NUM_NODES = Variable("SLURM_STEP_NUM_NODES", int, SLURM, "nodes of the step")
SLURM_STEP_NUM_TASKS = Variable("SLURM_STEP_NUM_TASKS", int, SLURM, "tasks of the step: one a node")
SLURM_STEP_NODELIST = Variable("SLURM_STEP_NODELIST", str, SLURM, "nodes of the step, in SLURM's short form")
SLURM_NODEID = Variable("SLURM_NODEID", int, SLURM, "number of this node in the step")
SLURMD_NODENAME = Variable("SLURMD_NODENAME", str, SLURM, "name of this node")


#: What others leave behind: settings of torchrun, accelerate and ranks, and what changes the numerics unasked. Ranks do not get
#: them, except for those that torchrun sets anew.
FOREIGN = re.compile(
    r"PET_\w+|PYTHON_EXEC|LOGLEVEL|TORCH_?ELASTIC_\w+|(ACCELERATE|FSDP)_\w+|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
)


def foreign(environ: Environ | None = None) -> list[str]:
    """The names in ``environ`` that match ``FOREIGN``."""
    return sorted(name for name in (os.environ if environ is None else environ) if FOREIGN.fullmatch(name))


def internal() -> list[str]:
    """The names by which one part of liftdist tells another something."""
    return [variable.name for variable in table() if variable.by in (LAUNCHER, SCRIPT, SUBMIT)]


def table() -> Iterator[Variable]:
    """All variables, in the order of this file."""
    yield from (value for value in globals().values() if isinstance(value, Variable))


def slurm_start(environ: Environ | None = None) -> str:
    """Which start of its SLURM job a process belongs to: how often that was requeued and, then, restarted: ``2.0``."""
    return f"{SLURM_RESTART_COUNT.get(0, environ)}.{TRY.get(0, environ)}"


def this_job(environ: Environ | None = None) -> tuple[str, str]:
    """The SLURM job of this process, an array task as ``12_3``; and its start: how often it was requeued, then restarted."""
    job, task = SLURM_JOB_ID.need(environ), SLURM_ARRAY_TASK_ID.get(None, environ)
    if task is not None:
        job = f"{SLURM_ARRAY_JOB_ID.need(environ)}_{task}"
    return job, slurm_start(environ)


def start_name(job: str, start: str) -> str:
    """The name of one start of a job: of its folder of logs, and of its rendezvous."""
    return f"{job}-{start}"
