"""Starts torchrun: the one place where its command line is composed.

    liftdist train -> launcher -> torchrun -> ranks

on this machine; on several by hand (``--nnodes N --node-rank I --head HOST[:PORT]`` on each); or as one task a node of a SLURM
step, where everything comes from ``SLURM_*``. Whatever ends the launcher ends torchrun, and that its ranks.

A signal goes to the ranks, past torchrun, which would end them: the ranks agree, save and end, and torchrun after them. As long
as there is no rank, because modules are imported or other nodes are waited for, it ends torchrun: nothing has begun. Inside a
SLURM step signals reach every rank without help.

Ranks run the code of this package, whatever lies in the current folder, and no variable of the environment is an option of
torchrun.

Imports torch in torchrun's own process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from liftdist import config as configs
from liftdist import environment, failures, files, network, output, processes, signals, start
from liftdist.cluster import nodes
from liftdist.cluster.nodes import Place, say
from liftdist.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from liftdist.failures import Failure
from liftdist.heartbeat import heartbeat
from liftdist.options import split_arguments
from liftdist.redaction import redact
from liftdist.runs import layout
from liftdist.schema import Config

FAILED = "failed"  # a file in the folder of logs: ranks of some node have failed
JOIN_TIMEOUT, JOIN_TIMEOUT_SLURM = 600, 180  # seconds that nodes wait for each other: started by people, by SLURM
SHUTDOWN_TIMEOUT = 60  # seconds from torchrun's SIGTERM for a rank to its SIGKILL
_INTERRUPTS = 3  # that end everything without saving
_POLL = 0.1  # seconds between two looks at torchrun


def launch(
    config: Config, options: argparse.Namespace, where: Place, command: Sequence[str], typed: Sequence[str] = ()
) -> int:
    """Run ``liftdist.train *command`` on all ranks of this node, and wait for the end.

    Args:
        typed: the whole command as the user typed it, for the run directory.

    Returns:
        The exit code: a rank's own for what it knows (2, 75), 75 if there was no rank yet when a signal came, 0, or torchrun's.
        In SLURM torchrun's alone, which is 0 where all ranks ended alike: a bad exit would end the other nodes, and
        ``run_dir`` tells how the run ended.

    Raises:
        UserError: no space for temporary files, or no permission.
    """
    restarts = options.max_restarts
    if restarts is None:  # a job starts them again by itself
        restarts = 2 if config.train.fit_memory and not where.in_job else 0
    nproc = options.nproc or (config.slurm.ranks_per_node if where.in_job else None) or _gpus()
    logs = layout.logs(Path(config.run_dir).expanduser(), where.id) if where.id else None
    with contextlib.ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liftdist-")))
        except OSError as error:
            raise UserError(f"no folder for temporary files: {files.reason(error)}; set TMPDIR") from None
        folder = logs or scratch  # for reports of nodes and records of ranks
        report = folder / f"node-{where.node_rank:05d}.json"  # its time is this node's heartbeat
        agent_log = folder / f"node-{where.node_rank:05d}.torchrun.log"
        try:
            files.write(report, json.dumps({"host": platform.node()}))
            log = stack.enter_context(files.open_to_append(agent_log))
        except OSError as error:
            raise UserError(files.reason(error)) from None
        log.reconfigure(line_buffering=True)
        status = scratch / "status"  # a folder that only this user can write to
        variables = _variables(nproc, where, folder, logs, typed) | {environment.STATUS_FILE.name: str(status)}
        torchrun = [*torchrun_arguments(where, nproc, restarts), start.__file__, "liftdist.train"]
        torchrun += [word.replace("$", "$$") for word in command]  # torchrun substitutes ${local_rank}
        with heartbeat(lambda: os.utime(report, follow_symlinks=False)):
            code, stopped = _supervise(torchrun, variables, log, folder, status, where.in_job)
        known, found = _status(status), failures.read(folder)
        if known is None and code and found and found[0].kind == failures.USER_ERROR:
            known = EXIT_USER_ERROR  # of a rank that ended before it could write it
        with contextlib.suppress(OSError):  # the run is over, and how it ended stands elsewhere, too
            files.write(report, json.dumps({"host": platform.node(), "ended": time.time(), "code": known or code}))
            if where.in_job and code:
                files.write(folder / FAILED, "")
        if where.in_job:
            return code
        if stopped:
            say(f"stopped ({stopped}) before training began; the same command starts it")
            return EXIT_STOPPED
        if known == EXIT_USER_ERROR or (known is None and code):
            say(failures.summary(found) or last_words([agent_log]))
        if known is None and code:
            say("ended by an error; the same command continues from the newest checkpoint, if there is one")
        return code if known is None else known


def torchrun_arguments(where: Place, nproc: int, max_restarts: int) -> list[str]:
    """The options of torchrun."""
    composed = [
        f"--nproc-per-node={nproc}",
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={SHUTDOWN_TIMEOUT}",
        "--signals-to-handle=SIGQUIT",  # the others are for the ranks
        f"--node-rank={where.node_rank}",
        f"--nnodes={where.nnodes}",
    ]
    if where.nnodes == 1:
        return [*composed, "--standalone"]
    head = f"[{where.head}]" if ":" in where.head else where.head
    conf = {"is_host": where.node_rank == 0, "join_timeout": JOIN_TIMEOUT_SLURM if where.in_job else JOIN_TIMEOUT}
    return [
        *composed,
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{where.port}",
        f"--rdzv-id={where.id}",
        f"--rdzv-conf={','.join(f'{key}={str(value).lower()}' for key, value in conf.items())}",
        f"--local-addr={where.address}",
    ]


def _variables(nproc: int, where: Place, folder: Path, logs: Path | None, typed: Sequence[str]) -> dict[str, str]:
    """The environment of torchrun and the ranks: this process's, without what others left there, and with defaults."""
    cores = environment.SLURM_CPUS_PER_TASK.get(0) if where.in_job else 0
    cores = cores or len(os.sched_getaffinity(0))
    added = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),  # several ranks share the cores of one machine
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # keys left in a shared store keep restarted ranks from meeting
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # what every rank was waiting for, by NCCL's flight recorder
        "TORCH_FR_BUFFER_SIZE": "2000",
        environment.STARTED.name: str(int(time.time())),
    }
    if logs:
        added["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(logs / "nccl-rank-")
        added[environment.LOGS.name] = str(logs)
    interface = network.interface_of(where.address) if where.nnodes > 1 else None
    if interface:  # gloo takes the host's own name, which may be 127.0.1.1
        added |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    foreign = environment.foreign()
    if foreign and where.node_rank == 0:
        given = ", ".join(f"{name}={redact(os.environ[name])}" for name in foreign)
        say(f"not used, though in the environment: {given}; see --nproc, --nnodes, --node-rank and --head")
    dropped = set(foreign)
    if not where.in_job:  # what another job left; the commits are this command's own
        dropped |= {*environment.internal()} - {environment.COMMITS.name}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    ours = {
        environment.FAILURES.name: str(folder),
        environment.LAUNCH.name: where.id or str(folder),
        "PYTHONSAFEPATH": "1",  # the current folder holds no modules of the ranks
        "PYTHONUTF8": "1",
    }
    if typed:
        ours[environment.COMMAND.name] = json.dumps(list(typed))
    return added | inherited | ours


def _supervise(
    torchrun: list[str], variables: dict[str, str], log: TextIOWrapper, folder: Path, status: Path, in_job: bool
) -> tuple[int, str | None]:
    """Run torchrun in a session of its own and hand signals to its ranks.

    Args:
        status: exists once there has been a rank.

    Returns:
        torchrun's exit code, and the signal that ended it because there was no rank yet.
    """
    waiting: list[int] = []  # signals that are not delivered yet
    interrupts, stopped = 0, None

    def received(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        waiting.append(number)
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts == _INTERRUPTS - 1:
                say("stopping; interrupt once more to end without saving")
            elif interrupts >= _INTERRUPTS:
                os.kill(child, signal.SIGKILL)

    parent = os.getpid()
    with signals.blocked():  # torchrun and the ranks begin like this: a signal waits until a rank is ready for it
        child = os.fork()
        if child == 0:
            _become_torchrun(torchrun, variables, log, folder, parent)
        signals.handle(received)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        ranks = _children(child) if waiting else []
        if ranks:
            for number in waiting if not in_job else ():  # a job has signalled its ranks itself
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, number)
            waiting.clear()
        elif waiting and not status.exists():
            stopped = signal.Signals(waiting[0]).name
            os.kill(child, signal.SIGKILL)
        time.sleep(_POLL)
    signals.handle(signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code, stopped


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def _become_torchrun(
    torchrun: list[str], variables: dict[str, str], log: TextIOWrapper, folder: Path, parent: int
) -> NoReturn:
    """In the forked process: run torchrun and leave records of ranks that died without one."""
    code = 1
    try:
        signals.handle(signal.SIG_DFL)
        os.setsid()
        processes.die_with_parent(parent)
        os.environ.clear()
        os.environ.update(variables | {environment.AGENT.name: str(os.getpid())})
        sys.stderr = log  # its own reports; ranks keep the real one
        quiet = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that goes away is expected here
        with processes.importing():
            from torch.distributed import run
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        for logger in logging.root.manager.loggerDict.values():  # torch may have been imported before
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        if variables.get("TORCH_CPP_LOG_LEVEL") != quiet:
            del os.environ["TORCH_CPP_LOG_LEVEL"]  # ranks keep their warnings
        try:
            run.run(run.parse_args(torchrun))
            code = 0
        except ChildFailedError as error:
            if all(failure.exitcode == EXIT_STOPPED for failure in error.failures.values()):
                code = EXIT_STOPPED  # of ranks that had no space to write it
            else:
                for rank, failure in error.failures.items():
                    _record_death(folder, rank, failure)
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc(file=log)
    finally:
        os._exit(code)


def _record_death(folder: Path, rank: int, failure: Any) -> None:
    """``failure``: torchelastic's ``ProcessFailure``."""
    if failure.exitcode < 0:
        text = f"killed by {failure.signal_name()}"
        if failure.exitcode == -signal.SIGKILL:
            text += ", as the kernel does when memory runs out"
    else:
        text = f"exit code {failure.exitcode}"
    kind = failures.LOST_PEERS if failure.exitcode == -signal.SIGTERM else failures.BUG  # torchrun ends the others
    failures.write(folder, Failure(rank, 0, platform.node(), float(failure.timestamp), text, "", kind))


def _status(path: Path) -> int | None:
    """What the ranks of this node wrote before they ended quietly."""
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):
        return None


def last_words(reports: Iterable[Path]) -> str:
    """Why torchrun itself ended, by its own reports."""
    for report in reports:
        with contextlib.suppress(OSError, ValueError):
            lines = [
                line.strip() for line in files.read(report).splitlines() if re.match(r"[\w.]*(Error|Exit)\b", line)
            ]
            if lines:
                return f"torchrun: {lines[-1]}"
    return "torchrun ended without a message"


def _gpus() -> int:
    """GPUs of this machine, or one: counted by a process that ends, as this one must not open them."""
    given = environment.SLURM_GPUS_ON_NODE.get("") if environment.SLURM_STEP_ID.is_set() else ""
    if given.isdigit() and int(given):
        return int(given)
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return 1
    code = "import torch; print(max(1, torch.cuda.device_count()))"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(given: Sequence[str] | None = None) -> None:
    """``launch/torchrun [options] CONFIG [key=value ...]``: like ``liftdist train``, without its checks beforehand."""
    parser = argparse.ArgumentParser(prog="launch/torchrun", description=main.__doc__, allow_abbrev=False)
    nodes.arguments(parser)
    try:
        if given is None:
            processes.use_utf8()
            output.take_over()
            signals.interrupt()
        options, command = parser.parse_known_args(given)
        words, _ = split_arguments(command)
        if not words:
            raise UserError("launch/torchrun: needs a config")
        config, _ = configs.load_runs(words[0], words[1:])[0]
        code = launch(config, options, nodes.place(config, options), command)
    except KeyboardInterrupt as reason:
        say(f"stopped ({reason}) before training began")
        code = EXIT_STOPPED
    except UserError as error:
        text = redact(str(error))
        say(text)
        code = EXIT_USER_ERROR
        if (logs := environment.LOGS.get()) is not None:  # for the batch script
            node = environment.SLURM_NODEID.need()
            failed = Failure(-1 - node, 0, platform.node(), time.time(), text, kind=failures.USER_ERROR)
            failures.write(logs, failed)
    sys.exit(code)


if __name__ == "__main__":
    main()
