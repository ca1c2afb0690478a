"""Starts torchrun: the one place where its command line is composed.

    liftdist train -> launcher -> torchrun -> ranks

on this machine; on several by hand (``--nnodes N --node-rank I --head HOST[:PORT]`` on each); or as one task a node of a SLURM
step, where everything comes from ``SLURM_*``. Whatever ends the launcher ends torchrun, and that its ranks.

A signal goes to the ranks, past torchrun, which would end them: the ranks agree, save and end, and torchrun after them.
Inside a SLURM step signals reach every process without help.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from liftdist import config as configs
from liftdist import environment, failures, files, network, schema
from liftdist.cluster import scheduler
from liftdist.errors import EXIT_USER_ERROR, UserError
from liftdist.failures import Failure
from liftdist.heartbeat import heartbeat
from liftdist.options import split_arguments
from liftdist.processes import die_with_parent
from liftdist.redaction import redact
from liftdist.runs import claims, layout
from liftdist.schema import Config

FAILED = "failed"  # a file in the folder of logs: ranks of some node have failed
JOIN_TIMEOUT, JOIN_TIMEOUT_SLURM = 600, 180  # seconds that nodes wait for each other: started by people, by SLURM
SHUTDOWN_TIMEOUT = 60  # seconds from torchrun's SIGTERM for a rank to its SIGKILL
_INTERRUPTS = 3  # that end everything without saving


@dataclass(frozen=True)
class Place:
    """Where the ranks of one node stand among those of all nodes."""

    nnodes: int = 1
    node_rank: int = 0
    head: str = ""  # address of the node that hosts the rendezvous
    port: int = 0
    id: str = ""  # of this start of this job, the same on all nodes and never used again
    address: str = ""  # of this node, as the others reach it
    in_job: bool = False  # started by the batch script, which decides by what nodes and ranks leave behind


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the launcher."""
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: one for each GPU, or one)")
    parser.add_argument("--nnodes", type=int, help="machines, when started by hand on each (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine; the head is 0")
    parser.add_argument(
        "--head", metavar="HOST[:PORT]", help=f"the machine with --node-rank 0 (port {network.DEFAULT_PORT})"
    )
    parser.add_argument("--max-restarts", type=int, default=0, help="times that ranks are started again after a crash")


def check(options: argparse.Namespace) -> None:
    """Raises ``UserError``: a number that makes no sense."""
    for name, least in (("nproc", 1), ("nnodes", 1), ("node_rank", 0), ("max_restarts", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def place(config: Config, options: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Place:
    """Where this node stands.

    Raises:
        UserError: options that do not fit together, a head that has no address, a port in use.
    """
    check(options)
    if options.nnodes is None and environment.SLURM_STEP_ID.is_set(environ):
        return _slurm_place(environ)
    nnodes = options.nnodes or 1
    if options.node_rank >= nnodes:
        raise UserError(f"--node-rank {options.node_rank}: must be below --nnodes {nnodes}")
    if nnodes == 1:
        if (nodes := environment.SLURM_JOB_NUM_NODES.get(1, environ)) > 1:
            print(
                f"liftdist: this job has {nodes} nodes, only this one is used; `liftdist submit` uses all",
                file=sys.stderr,
            )
        return Place()
    if options.head is None:
        raise UserError(f"--nnodes {nnodes} needs --head HOST[:PORT], the machine with --node-rank 0")
    name, port = network.split_endpoint(options.head)
    head = network.resolve(name)
    if network.is_loopback(head) and name != head and options.node_rank == 0:
        raise UserError(f"--head {name}: is {head} on this machine; give the address by which the others reach it")
    if options.node_rank == 0:
        network.check_port(head, port)
    attempt = len(claims.attempts(Path(config.run_dir).expanduser())) + 1
    own = head if options.node_rank == 0 else network.outgoing_address(head)
    return Place(nnodes, options.node_rank, head, port, f"{name}-{port}-{attempt}", own)


def _slurm_place(environ: Mapping[str, str] | None) -> Place:
    nodes, tasks = environment.SLURM_STEP_NUM_NODES.need(environ), environment.SLURM_STEP_NUM_TASKS.need(environ)
    if nodes != tasks:
        raise UserError(f"{tasks} tasks on {nodes} nodes: start one a node, srun --ntasks-per-node=1")
    start = environment.start_name(*environment.this_job(environ))
    rank = environment.SLURM_NODEID.need(environ)
    in_job = environment.LOGS.is_set(environ)
    if nodes == 1:
        return Place(id=start, in_job=True) if in_job else Place()
    if in_job:  # the batch script has found a free port
        head, port = network.split_endpoint(environment.HEAD.need(environ))
    else:
        names = scheduler.node_names(environment.SLURM_STEP_NODELIST.need(environ))
        head = network.resolve(names[0]) if rank else network.outgoing_address(network.resolve(names[1]))
        seed = int(environment.SLURM_JOB_ID.need(environ)) * 7 + environment.SLURM_STEP_ID.need(environ)
        port = network.PORTS[seed % len(network.PORTS)]
    if rank == 0:
        network.check_port(head, port)
    return Place(nodes, rank, head, port, start, head if rank == 0 else network.outgoing_address(head), in_job)


# ---------------------------------------------------------------------------------------------------------------------
# Running.


def launch(config: Config, options: argparse.Namespace, where: Place, command: Sequence[str]) -> int:
    """Run ``python -m liftdist.train *command`` on all ranks of this node, and wait for the end.

    Returns:
        The exit code: a rank's own for what it knows (2, 75), 0, or torchrun's. In SLURM torchrun's alone, which is 0 where
        all ranks ended alike: a bad exit would end the other nodes, and ``run_dir`` tells how the run ended.
    """
    nproc = options.nproc or (config.slurm.ranks_per_node if where.in_job else None) or _gpus()
    logs = layout.logs(Path(config.run_dir).expanduser(), where.id) if where.id else None
    with tempfile.TemporaryDirectory(prefix="liftdist-") as scratch:
        folder = logs or Path(scratch)  # for reports of nodes and records of ranks
        report = folder / f"node-{where.node_rank:05d}.json"  # its time is this node's heartbeat
        agent_log = folder / f"node-{where.node_rank:05d}.torchrun.log"
        status = Path(scratch) / "status"  # written by ranks, in a folder that only this user can write to
        variables = _variables(nproc, where, folder, logs) | {environment.STATUS_FILE.name: str(status)}
        files.write(report, json.dumps({"host": platform.node()}))
        torchrun = [*torchrun_arguments(where, nproc, options.max_restarts), "-m", "liftdist.train", *command]
        with _open_log(agent_log) as log, heartbeat(lambda: os.utime(report, follow_symlinks=False)):
            code = _supervise(torchrun, variables, log, folder, where.in_job)
        known, found = _status(status), failures.read(folder)
        if known is None and code and found and found[0].kind == failures.USER_ERROR:
            known = EXIT_USER_ERROR  # of a rank that ended before it could write it
        files.write(report, json.dumps({"host": platform.node(), "ended": time.time(), "code": known or code}))
        if where.in_job:
            if code:
                files.write(folder / FAILED, "")
            return code
        if known == EXIT_USER_ERROR or (known is None and code):
            print(f"liftdist: {failures.summary(found) or last_words([agent_log])}", file=sys.stderr)
        if known is None and code:
            again = "the same command continues from the newest checkpoint, if there is one"
            print(f"liftdist: ended by an error; {again}", file=sys.stderr)
        return code if known is None else known


def _open_log(path: Path) -> TextIOWrapper:
    """A file for torchrun's own reports. Raises ``UserError``."""
    try:
        log = files.open_to_append(path)
    except OSError as error:
        raise UserError(files.reason(error)) from None
    log.reconfigure(line_buffering=True)
    return log


def torchrun_arguments(where: Place, nproc: int, max_restarts: int) -> list[str]:
    """The options of torchrun."""
    composed = [
        f"--nproc-per-node={nproc}",
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={SHUTDOWN_TIMEOUT}",
        "--signals-to-handle=SIGHUP,SIGQUIT",  # the others are for the ranks
    ]
    if where.nnodes == 1:
        return [*composed, "--standalone"]
    head = f"[{where.head}]" if ":" in where.head else where.head
    conf = {"is_host": where.node_rank == 0, "join_timeout": JOIN_TIMEOUT_SLURM if where.in_job else JOIN_TIMEOUT}
    return [
        *composed,
        f"--nnodes={where.nnodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{where.port}",
        f"--rdzv-id={where.id}",
        f"--rdzv-conf={','.join(f'{key}={str(value).lower()}' for key, value in conf.items())}",
        f"--local-addr={where.address}",
    ]


def _variables(nproc: int, where: Place, folder: Path, logs: Path | None) -> dict[str, str]:
    """The environment of torchrun and the ranks: this process's, with defaults for what is unset."""
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
    ours = {environment.FAILURES.name: str(folder), environment.LAUNCH.name: where.id or str(folder)}
    return added | os.environ | ours


def _supervise(torchrun: list[str], variables: dict[str, str], log: TextIOWrapper, folder: Path, in_job: bool) -> int:
    """Run torchrun in a session of its own, hand signals to its ranks, and return its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _become_torchrun(torchrun, variables, log, folder, parent)
    interrupts = 0

    def received(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts == _INTERRUPTS - 1:
                print("liftdist: stopping; interrupt once more to end without saving", file=sys.stderr, flush=True)
            elif interrupts >= _INTERRUPTS:
                os.kill(child, signal.SIGKILL)
        if in_job:
            return  # which has signalled the ranks itself
        for task in Path(f"/proc/{child}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for rank in task.read_text().split():
                    os.kill(int(rank), signal.SIGTERM if number == signal.SIGHUP else number)

    for name in (*schema.STOP_SIGNALS, "SIGHUP"):
        signal.signal(signal.Signals[name], received)
    _, status = os.waitpid(child, 0)
    for name in (*schema.STOP_SIGNALS, "SIGHUP"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become_torchrun(
    torchrun: list[str], variables: dict[str, str], log: TextIOWrapper, folder: Path, parent: int
) -> NoReturn:
    """In the forked process: run torchrun and leave records of ranks that died without one."""
    code = 1
    try:
        for name in schema.STOP_SIGNALS:  # ranks begin like this, too, until they are ready for them
            signal.signal(signal.Signals[name], signal.SIG_IGN)
        os.setsid()
        die_with_parent(parent)
        os.environ.update(variables)
        sys.stderr = log  # its own reports; ranks keep the real one
        quiet = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that goes away is expected here
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
            for rank, failure in error.failures.items():
                _record_death(folder, rank, failure)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
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
    given = environment.SLURM_GPUS_ON_NODE.get("")
    if given.isdigit() and int(given):
        return int(given)
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return 1
    code = "import torch; print(max(1, torch.cuda.device_count()))"
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(given: Sequence[str] | None = None) -> None:
    """``launch/torchrun [options] CONFIG [key=value ...]``: like ``liftdist train``, without its checks beforehand."""
    parser = argparse.ArgumentParser(prog="launch/torchrun", description=main.__doc__, allow_abbrev=False)
    arguments(parser)
    options, command = parser.parse_known_args(given)
    words, _ = split_arguments(command)
    try:
        if not words:
            raise UserError("launch/torchrun: needs a config")
        config, _ = configs.load(words[0], words[1:])
        code = launch(config, options, place(config, options), command)
    except UserError as error:
        text = redact(str(error))
        print(f"liftdist: {text}", file=sys.stderr)
        code = EXIT_USER_ERROR
        if (logs := environment.LOGS.get()) is not None:  # for the batch script
            node = environment.SLURM_NODEID.need()
            failed = Failure(-1 - node, 0, platform.node(), time.time(), text, kind=failures.USER_ERROR)
            failures.write(logs, failed)
    sys.exit(code)


if __name__ == "__main__":
    main()
