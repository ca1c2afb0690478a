"""SLURM's commands are run here, and asked again where a controller is busy, restarts, or is away for a while.

    run: once, killed when it hangs        ask: a question, within a bound        submit: never twice

User input never reaches a shell. Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from liftdist import environment as env
from liftdist.errors import UserError

_PATIENCE = 90  # seconds in which a question is asked again, unless LIFTDIST_PATIENCE says otherwise
_ANSWER = 45.0  # seconds for one answer; SLURM's own commands try for up to 20 before they report a failure
_SUBMISSION = 200.0  # sbatch itself tries again for two minutes where the controller takes no jobs
_LOOKS = (2, 5, 10)  # seconds before each look for a job that sbatch may have submitted
HUNG = 124  # exit code of a command that was killed because it hung

#: What SLURM prints about failures that pass. All others last: an unknown job, a partition that does not exist, ...
_TEMPORARY = re.compile(
    r"Unable to contact slurm|timed out|temporarily|try again|Zero Bytes were|Unexpected message received"
    r"|Communication (connection|shutdown) failure|Message (send|receive) failure|Header lengths are longer|standby mode"
    r"|Connection (refused|reset)|Broken pipe|No route to host|Network is unreachable|Transport endpoint"
    r"|failed to fetch( remote)? config|authentication (error|credential)|Munge \w+ failed|persistent connection"
    r"|Unable to connect to database|Slurm job queue full",
    re.IGNORECASE,
)
#: By these a user's shell changes what the commands select, print or ask: SQUEUE_PARTITION hides jobs, SBATCH_WAIT waits for
#: the end of the job, SBATCH_ARRAY_INX makes it an array. The other SBATCH_* are defaults of the user, and kept.
_MISLEADING = re.compile(
    r"(SQUEUE|SACCT|SCANCEL|SCONTROL)_\w+|SLURM_(TIME_FORMAT|BITSTR_LEN|DEBUG_FLAGS)|SBATCH_(WAIT|ARRAY_INX|ERROR|DEBUG)"
)


class NoAnswer(UserError):
    """SLURM does not answer now; it may later."""


def clean(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command: that of a job to submit, or this process's, without what changes its output."""
    kept = {key: value for key, value in (given or os.environ).items() if not _MISLEADING.fullmatch(key)}
    return kept if given else kept | {"LC_ALL": "C"}


def run(
    command: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's once; one that hangs is killed, with all that it started, and ends with code ``HUNG``.

    Raises:
        UserError: there is no such command, or it cannot be run.
    """
    timeout = timeout or _ANSWER
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", env=clean(variables), start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; this is no machine of a SLURM cluster") from None
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise UserError(f"{command[0]}: {error}") from None
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        hung = process.poll() is None  # or else a process that it left behind holds the pipes
        output, errors = _kill(process)
        if hung:
            problem = f"{errors}\n{command[0]}: no answer within {timeout:.0f} s"
            return subprocess.CompletedProcess(command, HUNG, output, problem)
    except BaseException:
        _kill(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process and all that it started; what it printed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a disk cannot be killed
        return process.communicate(timeout=2)
    return "", ""


def is_temporary(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a command may succeed if it is run again."""
    killed = done.returncode < 0 or done.returncode == HUNG
    return killed or (done.returncode != 0 and _TEMPORARY.search(done.stderr + done.stdout) is not None)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a command failed, in one line, in SLURM's words."""
    lines = [
        re.sub(r"^(\w+: )?((\w+ )?error: |fatal: |allocation failure: )?", "", line.strip())
        for line in done.stderr.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or f"exit code {done.returncode} without a message"


def _patience() -> float:
    return env.PATIENCE.get(_PATIENCE)


def pauses() -> Iterator[float]:
    """Seconds to wait before a question is asked once more."""
    return itertools.chain((1, 2, 4, 8), itertools.repeat(10))


def ask(
    command: Sequence[str], variables: Mapping[str, str] | None = None, patience: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that may run twice, again while it fails for a reason that passes.

    Args:
        patience: seconds, where not as usual; 0 asks once.

    Raises:
        NoAnswer: it still fails so.
        UserError: there is no such command.
    """
    patience = _patience() if patience is None else patience
    ends = time.monotonic() + patience
    for number, pause in enumerate(pauses()):
        done = run(command, variables)
        if not is_temporary(done):
            return done
        if time.monotonic() + pause > ends:
            raise NoAnswer(f"SLURM does not answer: {command[0]}: {reason(done)}")
        if number == 0:
            print(
                f"liftdist: SLURM does not answer ({reason(done)}); asking for up to {patience:.0f} s", file=sys.stderr
            )
        time.sleep(pause)
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# Submitting: sbatch may have submitted a job and not know it.


def submit(command: Sequence[str], variables: Mapping[str, str], mark: str) -> str:
    """The id of the job that ``command`` submits, once.

    Args:
        mark: a word of the command that no other job has.

    Raises:
        UserError: with SLURM's reason.
        NoAnswer: SLURM does not answer; the message says where the job may have been queued all the same.
    """
    ends = time.monotonic() + _patience()
    for pause in pauses():
        done = run(command, variables, _SUBMISSION)
        id = _printed_id(done.stdout)
        if id and done.returncode == 0:
            _warn_of_cluster(done.stdout)
            return id
        if done.returncode and not id and not is_temporary(done):
            raise UserError(f"sbatch: {reason(done)}")
        if "connect failure" not in done.stderr:  # which leaves nothing behind
            try:
                queued = find(mark, _LOOKS)
            except NoAnswer as error:
                raise NoAnswer(
                    f"sbatch: {reason(done)}; the job may be queued all the same: {error}, and look for it with "
                    f"`squeue --me --format='%i %o'` (its command has {mark}) before you submit again"
                ) from None
            if queued:
                return queued
        if done.returncode == 0:
            raise UserError(
                f"sbatch: printed no job id, and no job of yours has {mark} in its command: {done.stdout!r}"
            )
        if time.monotonic() + pause > ends:
            raise NoAnswer(f"sbatch: {reason(done)}; nothing was submitted, try again later")
        print(f"liftdist: not submitted yet ({reason(done)}); trying again", file=sys.stderr)
        time.sleep(pause)
    raise AssertionError


def _warn_of_cluster(output: str) -> None:
    """Jobs of another cluster are unknown to this one's controller."""
    named = re.findall(r"^(?:\d+;|Submitted batch job \d+ on cluster )([\w.-]+)\s*$", output, re.M | re.ASCII)
    if named and os.environ.get("SLURM_CLUSTERS") != named[-1]:
        print(
            f"liftdist: submitted to cluster {named[-1]}: with SLURM_CLUSTERS={named[-1]} set, liftdist status, logs and "
            "cancel ask that one",
            file=sys.stderr,
        )


def _printed_id(output: str) -> str | None:
    """The job id that sbatch printed, among what a site lets it print besides. A cluster's name may follow."""
    ids = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;[\w.-]+| on cluster [\w.-]+)?\s*$", output, re.M | re.ASCII)
    return ids[-1] if ids else None


def find(mark: str, looks: Sequence[float] = (0,)) -> str | None:
    """The newest job of this user that has ``mark`` in its command.

    Args:
        looks: seconds before each look; a busy controller may work on a submission for a while.

    Raises:
        NoAnswer: SLURM does not answer.
    """
    for pause in looks:
        time.sleep(pause)
        done = ask(["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%o"])
        if done.returncode:
            raise NoAnswer(f"SLURM does not answer: squeue: {reason(done)}")
        ids = [re.match(r"(\d+)\|", line, re.ASCII) for line in done.stdout.splitlines() if mark in line]
        if found := [int(id[1]) for id in ids if id]:
            return str(max(found))
    return None
