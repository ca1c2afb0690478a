"""Cost of a checkpoint: its size relative to full fine-tuning, and the time for which it blocks training.

    python -m bench checkpoint [--ranks 2] [--rounds 3] [--model FOLDER] [--out FILE]

Full fine-tuning would save float32 weights and two moments: 12 B per parameter.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import contenders, measure
from liftdist.distributed import collectives
from liftdist.distributed import mesh as meshes
from liftdist.runs import checkpoint, claims
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.saver import Checkpointer, Saved


def main() -> None:
    parser = measure.parser("checkpoint", __doc__, ranks=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = measure.on_ranks(parser)
    config = measure.config()
    found: dict[str, list[float]] = {"waiting": [], "saving": []}
    with (
        meshes.start(config.mesh.layout, config.mesh.timeout) as mesh,
        tempfile.TemporaryDirectory(dir=".cache") as scratch,
    ):
        run_dir = Path(collectives.gather(scratch)[0]) / "run"
        claimed = claims.claim(run_dir, lambda past: checkpoint.accepted(run_dir, past)) if mesh.is_main else None
        side = contenders.Liftdist(contenders.load(options.model, mesh.device), config, mesh)
        saver = Checkpointer(collectives.gather(claimed)[0], mesh, 2, None)
        batch = next(contenders.batches(side.model.config.vocab_size, 1, 16, mesh.device, mesh.rank))
        parameters = sum(param.numel() for param in side.model.parameters())
        for step in range(1, options.rounds + 1):
            side.forward_backward(batch)
            side.update()
            began = time.perf_counter()
            state = side.principal.state_dict(side.optimizer)
            saver.save(state, side.principal.matrices, Snapshot(step, {"step": step}, Provenance("", {}, "", "")))
            found["waiting"].append(time.perf_counter() - began)
            saver.wait()
            found["saving"].append(time.perf_counter() - began)
            outcome = saver.take_outcome()
            if not isinstance(outcome, Saved):
                raise RuntimeError(f"not saved: {outcome}")
            size = sum(path.stat().st_size for path in (run_dir / "checkpoints" / outcome.name).iterdir())
        torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        results = {key: statistics.median(values) for key, values in found.items()}
        results |= {"bytes": size, "of_full": size / (12 * parameters)}
        print(f"{measure.machine()}, torch {torch.__version__}, {options.ranks} ranks")
        print(
            f"{size / 1e6:.1f} MB, {results['of_full']:.4f} of full fine-tuning's; "
            f"training waits {results['waiting']:.3f} s, saved after {results['saving']:.3f} s"
        )
        measure.write({"ranks": options.ranks, "results": results, "rounds": found}, options.out)


if __name__ == "__main__":
    main()
