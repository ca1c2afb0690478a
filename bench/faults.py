"""Kill ranks while they save: is a committed step ever lost, or a mixture of two steps ever loaded?

    python -m bench faults [--kills 200] [--json FILE]

Two ranks save steps without pause, a random one of them is killed at a random time, and the newest checkpoint is loaded: it
must be at least the newest step that was reported as committed, and every weight in it must be of that step. The next two ranks
continue from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from liftdist import PrincipalWeights
from liftdist.distributed.collectives import gather
from liftdist.distributed.mesh import Mesh
from liftdist.runs import checkpoint, claims
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.saver import Checkpointer, Saved

RANKS = 2


def _model(mesh: Mesh | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(191, 191, bias=False) for _ in range(4)])
    return fully_shard(model, mesh=mesh.shard_mesh) if mesh else model


def _principal(mesh: Mesh | None) -> PrincipalWeights:
    return PrincipalWeights(_model(mesh), density=0.3, filter_rank=8)


def _save_for_ever(rank: int, folder: Path, run_dir: Path) -> None:
    """Save steps whose values all equal the number of the step, and append each committed one to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = Mesh(torch.device("cpu"), init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp_replicate", "dp_shard")))
    claimed = claims.claim(run_dir, lambda history: checkpoint.accepted(run_dir, history)) if rank == 0 else None
    attempt = gather(claimed)[0]
    saved = checkpoint.newest(run_dir, attempt.accepts, rank, RANKS, print)
    principal = _principal(mesh)
    if saved is not None:
        principal.load_state_dict(saved.read(principal.matrices))
    step = saved.number if saved else 0
    saver = Checkpointer(attempt, mesh, 2, saved)
    with (folder / "committed").open("a") as committed:
        while True:
            step += 1
            with torch.no_grad():
                principal.values.fill_(step)
            principal.write_back()
            saver.save(principal.state_dict(), principal.matrices, Snapshot(step, {}, Provenance("", {}, "", "")))
            saver.wait()
            outcome = saver.take_outcome()
            if rank == 0 and isinstance(outcome, Saved):
                committed.write(f"{step}\n")
                committed.flush()


def _check(run_dir: Path, committed: int) -> tuple[int, str | None]:
    """The newest step that loads, and what is wrong with it, or None."""
    accepted = checkpoint.accepted(run_dir, claims.attempts(run_dir))
    step = checkpoint.newest(run_dir, accepted, 0, 1, print, set_aside=False)
    number = step.number if step else 0
    if number < committed:
        return number, f"step {committed} was committed but is lost"
    if step is not None:
        for key, tensor in step.read(_principal(None).matrices).items():
            if key.endswith("/values") and not (tensor == number).all():
                return number, f"step {number} holds values of other steps: {tensor.unique().tolist()}"
    return number, None


def kill_while_saving(kills: int, folder: Path, seed: int = 0) -> dict[str, object]:
    """Kill a rank ``kills`` times and return the counts. Raises ``RuntimeError`` at the first lost or mixed step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.faults"])
    chance, run_dir = random.Random(seed), folder / "run"
    newest, left_over = 0, 0
    began = time.perf_counter()
    for number in range(kills):
        place = folder / f"kill-{number}"
        place.mkdir()
        (place / "committed").touch()
        ranks: list[BaseProcess] = [
            context.Process(target=_save_for_ever, args=(rank, place, run_dir), daemon=True) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        while not (place / "committed").read_text():  # kill during saves, not during the start
            if not all(process.is_alive() for process in ranks):
                raise RuntimeError(f"kill {number}: a rank ended by itself")
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        victim = ranks[chance.randrange(RANKS)].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        time.sleep(chance.choice([0, 0.02]))  # the other rank may or may not notice before it is killed, too
        for process in ranks:
            process.kill()
            process.join()
        left_over += any("removed" not in path.name for path in (run_dir / "checkpoints").glob(".step-*"))
        newest, problem = _check(run_dir, int((place / "committed").read_text().split()[-1]))
        if problem:
            raise RuntimeError(f"kill {number}: {problem}")
    return {
        "kills": kills,
        "inside a save": left_over,
        "steps committed": newest,
        "lost": 0,
        "mixed": 0,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from bench.faults import kill_while_saving as kill  # imported by name, so that the fork server can unpickle it

    with tempfile.TemporaryDirectory() as scratch:
        result = kill(options.kills, Path(scratch))
    result |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
