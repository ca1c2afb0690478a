"""Where the ranks of a node stand among those of all nodes: by the command's options, or by what SLURM says of the step."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liftdist import environment, network
from liftdist.cluster import scheduler
from liftdist.errors import UserError
from liftdist.runs import claims
from liftdist.schema import Config


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
    parser.add_argument(
        "--max-restarts",
        type=int,
        help="times that ranks are started again after a crash (default: 0; with train.fit_memory 2, for a smaller plan)",
    )


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
    for name in ("head", "node_rank") if (options.nnodes or 1) == 1 else ():
        if value := getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: needs --nnodes N, the number of machines, or leave it out"
            )
    # a terminal belongs to one shell: what `srun --pty` or `salloc` started is no task of a step of launchers
    if options.nnodes is None and environment.SLURM_STEP_ID.is_set(environ) and not _has_terminal():
        return _slurm_place(environ)
    nnodes = options.nnodes or 1
    if options.node_rank >= nnodes:
        raise UserError(f"--node-rank {options.node_rank}: must be below --nnodes {nnodes}")
    if nnodes == 1:
        if (nodes := environment.SLURM_JOB_NUM_NODES.get(1, environ)) > 1:
            say(f"this job has {nodes} nodes, only this one is used; `liftdist submit` uses all")
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


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(0)
    return False


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


def say(message: str) -> None:
    print(f"liftdist: {message}", file=sys.stderr)
