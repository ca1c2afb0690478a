"""Time to load a sharded model, and bytes that each rank reads.

python -m bench load [--ranks 2] [--rounds 3] [--model FOLDER] [--out FILE]
"""

from __future__ import annotations

import os
import statistics
from unittest import mock

import torch

from bench import measure
from liftdist.distributed import collectives
from liftdist.distributed import mesh as meshes
from liftdist.distributed.sharding import local_tensor
from liftdist.models import build
from liftdist.models.load import load
from liftdist.models.weights import ModelFolder


def main() -> None:
    parser = measure.parser("load", __doc__, ranks=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = measure.on_ranks(parser)
    config, read = measure.config(), 0
    originals = {name: getattr(ModelFolder, name) for name in ("read", "row")}  # row: for the check of random rows

    def counting(name):
        def wrapped(self, *arguments):
            nonlocal read
            tensor = originals[name](self, *arguments)
            read += tensor.nbytes
            return tensor

        return wrapped

    taken = []
    with (
        meshes.start(config.mesh.layout, config.mesh.timeout) as mesh,
        mock.patch.multiple(ModelFolder, **{n: counting(n) for n in originals}),
    ):
        for _ in range(options.rounds):
            read = 0
            seconds, (model, _) = measure.timed(lambda: load(options.model, config.model, mesh))
            taken.append(seconds)
            share = sum(local_tensor(tensor).nbytes for tensor in build.tensors(model).values())
        ratio = max(collectives.gather(read / share))
    if os.environ["RANK"] == "0":
        found = {"seconds": statistics.median(taken), "read_over_share": ratio, "share_bytes": share}
        print(f"{measure.machine()}, torch {torch.__version__}, {options.ranks} ranks")
        print(f"{found['seconds']:.2f} s; a rank reads at most {ratio:.4f} x its share of {share / 2**20:.1f} MiB")
        measure.write({"ranks": options.ranks, "results": found, "rounds": taken}, options.out)


if __name__ == "__main__":
    main()
