"""Live bytes of a rank in one training step, against the planner's estimate.

python -m bench memory [--ranks 2] [--rows 2] [--length 512] [--ways kept recomputed] [--model FOLDER] [--out FILE]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig

from bench import contenders, measure
from liftdist.distributed import collectives
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh
from liftdist.engine import reductions
from liftdist.models.load import load
from liftdist.planning import activations, footprint, shapes
from liftdist.planning.live_bytes import LiveBytes
from liftdist.schema import Config

#: What layers keep for their backward: ``model.activation_checkpointing`` and ``model.offload_activations``.
WAYS: dict[str, tuple[bool | int | str, bool]] = {
    "kept": (False, False),
    "recomputed": (True, False),
    "second": (2, False),
    "selective": ("selective", False),
    "offloaded": (False, True),
    "recomputed-offloaded": (True, True),
}


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without the copies that it makes itself being counted: gloo copies what it reduces, NCCL does not."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **keywords)

    return call


def measured(folder: Path, config: Config, mesh: Mesh) -> dict[str, Any]:
    """Peak bytes of the second step, and of a selection by gradients before it; bytes held between steps; what is planned."""
    live = LiveBytes()
    rows, length = config.train.micro_batch_size, config.data.max_length
    counted = mock.patch.object(reductions, "reduce_scatter_single", unseen(reductions.reduce_scatter_single))
    with counted, live:
        model, _ = load(folder, config.model, mesh)
        for param in model.parameters():
            live.add(param)
        contender = contenders.Liftdist(model, config, mesh, sharded=True)
        vocabulary = model.config.vocab_size
        del model
        given = contenders.batches(vocabulary, rows, length, mesh.device, mesh.rank, packed=config.data.packing)
        contender.forward_backward(next(given))
        contender.update()
        held = live.peak = live.now
        if config.selection.needs_data:
            contender.principal.refresh(contender.optimizer)
        contender.forward_backward(next(given))
        contender.update()
    hf_config = AutoConfig.from_pretrained(folder)
    size = shapes.sizes(contender.model, config)
    parts = footprint.memory(size, config, mesh.device_mesh.size(1), activations.activations(hf_config, config, rows))
    if not config.selection.needs_data:
        parts |= {"selecting": 0, "previously selected": 0}  # not in the measured step
    return {"peak": live.peak, "held": held, "parts": parts, "planned": footprint.peak(parts)}


def main() -> None:
    parser = measure.parser("memory", __doc__, ranks=2)
    parser.add_argument("--rows", type=int, default=2, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--ways", nargs="+", default=["kept", "recomputed"], choices=list(WAYS))
    options = measure.on_ranks(parser)
    config = measure.config()
    config.train.micro_batch_size, config.data.max_length = options.rows, options.length
    results: dict[str, Any] = {"ranks": options.ranks, "rows": options.rows, "length": options.length, "results": {}}
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        for way in options.ways:
            config.model.activation_checkpointing, config.model.offload_activations = WAYS[way]
            found = collectives.gather(measured(options.model, config, mesh))
            fullest = max(found, key=lambda one: one["peak"])
            results["results"][way] = fullest
    if os.environ["RANK"] == "0":
        print(f"{measure.machine()}, torch {torch.__version__}, {options.ranks} ranks; MiB")
        for name, one in results["results"].items():
            parts = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in one["parts"].items() if size)
            print(f"activations {name}: peak {one['peak'] / 2**20:.1f}, planned {one['planned'] / 2**20:.1f} ({parts})")
        measure.write(results, options.out)


if __name__ == "__main__":
    main()
