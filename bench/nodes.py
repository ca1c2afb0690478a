"""Traffic between two nodes and time of a step: FSDP2's hybrid sharding against liftdist.

    python -m bench nodes [--steps 1] [--rounds 5] [--mbit 1000] [--out FILE]

Needs root, iproute2, and the model and data of launch/quickstart. Two network namespaces act as the nodes, with one link between
them; each holds a replica on two ranks, which communicate over the loopback of the namespace. On the same four ranks both sides
train the same batches, alternating by round, first over the unlimited link, then over one of --mbit Mbit/s:

    dense     fully_shard on (dp_replicate, dp_shard), AdamW on the decoder's matrices: sends their whole gradient, in float32
    liftdist  configs/quickstart.yaml with one replica per node, one selection, its own Trainer: sends the flat gradient

Bytes are counted by the link's interface, in both directions. Start, selection and the first step of each are not measured.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bench import measure
from liftdist import config as configs
from liftdist.console import Console
from liftdist.data.batches import collate
from liftdist.data.order import split_micro_batches
from liftdist.data.tokenised import IGNORED
from liftdist.distributed import collectives
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh
from liftdist.engine.matrices import principal_matrices
from liftdist.models import build, weights
from liftdist.runs.context import RunContext
from liftdist.training import setup
from liftdist.training.inputs import prepare_inputs
from liftdist.training.objective import token_losses
from liftdist.training.trainer import Trainer

NODES, RANKS_PER_NODE = 2, 2
CONFIG = "configs/quickstart.yaml"
LINK = "between"  # name of the link's interface on each node
AIM = 12  # required factor by which liftdist sends fewer bytes


class Dense:
    """Training with FSDP2's hybrid sharding, on the batches of ``trainer``."""

    def __init__(self, trainer: Trainer, mesh: Mesh) -> None:
        self.trainer, self.mesh, self.consumed = trainer, mesh, 0
        config = trainer.config
        self.model = transformers.AutoModelForCausalLM.from_pretrained(trainer.inputs.folder, dtype=torch.bfloat16)
        self.model.requires_grad_(False)
        params = [place.param for place in principal_matrices(self.model).values()]
        for param in params:
            param.requires_grad_(True)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in build.decoder_layers(self.model):
            fully_shard(layer, mesh=mesh.device_mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh.device_mesh, mp_policy=policy)
        self.model.train()
        self.optimizer = torch.optim.AdamW(params, lr=config.optimizer.lr, weight_decay=0.0, fused=True)

    def run_step(self) -> float:
        """One optimizer step; returns its loss."""
        trainer, ranks = self.trainer, self.mesh.world_size
        sequences = trainer.order.batch(self.consumed)
        size = trainer.config.train.micro_batch_size
        micro_batches = split_micro_batches(sequences, trainer.inputs.samples.lengths, self.mesh.rank, ranks, size)
        batches = [collate(trainer.inputs.samples, micro) for micro in micro_batches]
        labels = sum((batch["labels"] != IGNORED).sum() for batch in batches)
        dist.all_reduce(labels)
        loss = torch.zeros(())
        for batch in batches:
            part = token_losses(self.model, batch) / labels
            (part * ranks).backward()  # FSDP averages over ranks
            loss += part.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(loss)
        self.consumed += len(sequences)
        return loss.item()


def traffic() -> int:
    """Bytes received and sent by this node's interface of the link so far."""
    lines = dict(line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    figures = next(figures for name, figures in lines.items() if name.strip() == LINK).split()
    return int(figures[0]) + int(figures[8])


def carried(mesh: Mesh, step: Callable[[], object]) -> int:
    """Bytes that ``step`` all-reduces between replicas, over all ranks; with two replicas gloo sends each byte once."""
    between, real, counts = mesh.replicate_group, dist.all_reduce, []

    def counting(tensor, *arguments, group=None, **others):
        if group is not None and group.group_name == between.group_name:
            counts.append(tensor.nbytes)
        return real(tensor, *arguments, group=group, **others)

    with mock.patch.object(dist, "all_reduce", counting):
        step()
    return sum(collectives.gather(sum(counts)))


def timed(step: Callable[[], object], steps: int) -> dict[str, float]:
    dist.barrier()
    before, began = traffic(), time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return {"bytes": (traffic() - before) / steps, "seconds": (time.perf_counter() - began) / steps}


def take_turns(
    options: argparse.Namespace, console: Console, dense: Dense, trainer: Trainer
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Measure both sides in turn over each link; returns link -> side -> rounds."""
    links: dict[str, dict[str, list[dict[str, float]]]] = {}
    for link in ("unlimited", f"{options.mbit} Mbit/s"):
        if link != "unlimited" and os.environ["LOCAL_RANK"] == "0":
            limit = f"tc qdisc add dev {LINK} root tbf rate {options.mbit}mbit burst 256kb latency 100ms"
            subprocess.run(limit.split(), check=True)
        rounds = links[link] = {"dense": [], "liftdist": []}
        for number in range(options.rounds):
            rounds["dense"].append(timed(dense.run_step, options.steps))
            rounds["liftdist"].append(timed(trainer.run_step, options.steps))
            last = ", ".join(f"{side} {found[-1]['seconds']:.2f} s" for side, found in rounds.items())
            console.say(f"{link}, round {number + 1} of {options.rounds}: {last} per step")
    return links


def rank(options: argparse.Namespace) -> None:
    """Entry point of a rank; rank 0 reports the results."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    overrides = [
        f"mesh.dp_replicate={NODES}",
        "selection.refresh_interval=0",
        f"train.steps={1 + 2 * options.rounds * options.steps}",
        "data.eval_path=",
        f"cache_dir={options.as_rank}",
    ]
    config, _ = configs.load(CONFIG, overrides)
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        console = Console(mesh.is_main)
        inputs = prepare_inputs(config, console)
        base = weights.digest(inputs.folder, Path(config.cache_dir))
        model, _, method = setup.model_and_method(RunContext(config, mesh, console), inputs.folder, base)
        model.train()
        trainer = Trainer(config, mesh, inputs, model, method)
        dense = Dense(trainer, mesh)
        losses: dict[str, float] = {}
        all_reduced = {
            "dense": carried(mesh, lambda: losses.update(dense=dense.run_step())),
            "liftdist": carried(mesh, lambda: losses.update(liftdist=trainer.run_step()["train/loss"])),
        }
        if not math.isclose(losses["dense"], losses["liftdist"], rel_tol=1e-3):
            raise RuntimeError(f"not the same model and batch: {losses}")
        links = take_turns(options, console, dense, trainer)
    if os.environ["RANK"] != "0":
        return
    results = {
        "model": inputs.folder.name,
        "density": config.selection.density,
        "filter_rank": config.selection.filter_rank,
        "layout": f"{NODES} nodes x {RANKS_PER_NODE} ranks, gloo, one replica per node",
        "sequences_per_step": config.train.batch_size,
        "steps_per_round": options.steps,
        "all_reduced_bytes": all_reduced,
        "results": {link: summary(rounds) for link, rounds in links.items()},
        "rounds": links,
    }
    report(results)
    measure.write(results, options.out)
    ratio = min(found["bytes"]["ratio"] for found in results["results"].values())
    if ratio < AIM:
        sys.exit(f"bench nodes: liftdist sends 1/{ratio:.1f} of the bytes, not 1/{AIM}")


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of the rounds, and of the ratios within a round."""
    result: dict[str, dict[str, float]] = {}
    for what in ("bytes", "seconds"):
        sides = {side: [found[what] for found in rounds[side]] for side in rounds}
        ratios = [dense / sparse for dense, sparse in zip(sides["dense"], sides["liftdist"], strict=True)]
        result[what] = {side: statistics.median(values) for side, values in sides.items()}
        result[what]["ratio"] = statistics.median(ratios)
    return result


def report(results: dict) -> None:
    print(f"{measure.machine()}, torch {torch.__version__}; {results['layout']}")
    print(f"{results['model']}, density {results['density']}, filter rank {results['filter_rank']}")
    print(f"{'per step':32s} {'dense':>13s} {'liftdist':>13s} {'ratio':>7s}")
    counted = results["all_reduced_bytes"]
    rows = {"bytes all-reduced": counted | {"ratio": counted["dense"] / counted["liftdist"]}}
    for link, found in results["results"].items():
        rows |= {f"bytes on the link, {link}": found["bytes"], f"seconds, {link}": found["seconds"]}
    for name, row in rows.items():
        digits = 2 if "seconds" in name else 0
        print(f"{name:32s} {row['dense']:13,.{digits}f} {row['liftdist']:13,.{digits}f} {row['ratio']:7.2f}")


@contextmanager
def linked_nodes() -> Iterator[list[subprocess.Popen]]:
    """Processes that each hold a network namespace, with a link between them; killed at the end of the block."""
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec cat"]
    nodes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(NODES)
    ]
    try:
        if not all(node.stdout and node.stdout.readline() for node in nodes):
            sys.exit("bench nodes: cannot create network namespaces; run as root, outside of an unprivileged container")
        link = f"ip link add {LINK} type veth peer name {LINK} netns {nodes[1].pid}"
        subprocess.run(inside(nodes[0], *link.split()), check=True)
        for number, node in enumerate(nodes, 1):
            for line in (f"ip addr add 10.0.0.{number}/24 dev {LINK}", f"ip link set {LINK} up"):
                subprocess.run(inside(node, *line.split()), check=True)
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def inside(node: subprocess.Popen, *command: str) -> list[str]:
    return ["nsenter", "-t", str(node.pid), "-n", *command]


def run(arguments: list[str]) -> None:
    """Start the ranks on their nodes and wait for them. All are killed if one fails or this process ends."""
    ranks: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as scratch, linked_nodes() as nodes:
        python = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "bench.nodes"]
        try:
            for number in range(NODES * RANKS_PER_NODE):
                environment = {
                    "MASTER_ADDR": "10.0.0.1",
                    "MASTER_PORT": "29500",
                    "WORLD_SIZE": str(NODES * RANKS_PER_NODE),
                    "RANK": str(number),
                    "LOCAL_WORLD_SIZE": str(RANKS_PER_NODE),
                    "LOCAL_RANK": str(number % RANKS_PER_NODE),
                    "GLOO_SOCKET_IFNAME": LINK,
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the namespaces have no host names, which torch warns about
                }
                command = inside(nodes[number // RANKS_PER_NODE], *python, *arguments, "--as-rank", scratch)
                ranks.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
            while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
                time.sleep(0.1)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()
    if any(process.returncode for process in ranks):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench nodes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over each link")
    parser.add_argument("--mbit", type=int, default=1000, help="bandwidth of the slower link, Mbit/s")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank(options)
        return
    if os.geteuid() != 0:
        sys.exit("bench nodes: needs root, to create network namespaces")
    if not Path(".cache/quickstart/train.jsonl").exists():
        sys.exit("bench nodes: .cache/quickstart/train.jsonl does not exist; run launch/quickstart first")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
