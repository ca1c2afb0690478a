"""liftdist against the alternatives of bench/contenders.py, on the same model, batch and sharding.

    python -m bench compare [--ranks 2] [--rows 2] [--length 128] [--rounds 5] [--synthetic 8b] [--out FILE]

Each contender is set up, takes two steps, is timed, and is freed before the next one: they would not fit together. The rounds
visit all contenders in turn, so that disturbances affect all alike. Bytes are those of tensors on rank 0.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from bench import contenders, measure
from bench.scale import MODELS
from bench.traffic import Traffic
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh
from liftdist.planning import footprint, shapes
from liftdist.planning.live_bytes import LiveBytes
from liftdist.schema import Config

COMPARED = ("full", "lora", "masked", "liftdist")


def measured(kind: str, options: argparse.Namespace, config: Config, mesh: Mesh) -> dict[str, Any]:
    """Set up a contender and measure it once."""
    gc.collect()
    live = LiveBytes()
    began = time.perf_counter()
    with live:
        model = make_model(options, mesh.device)
        for param in model.parameters():
            live.add(param)
        loaded = time.perf_counter()
        make = functools.partial(contenders.KINDS[kind], model, config, mesh, bf16=options.full_bf16)
        set_up, contender = measure.timed(make)
        del model, make
        batches = contenders.batches(
            contender.model.config.vocab_size, options.rows, options.length, mesh.device, seed=mesh.rank
        )

        def backward() -> None:
            for _ in range(options.micro_batches):
                contender.forward_backward(next(batches))

        def step() -> None:
            backward()
            contender.update()

        step()  # makes the optimizer's state
        live.peak = live.now
        with Traffic() as traffic:
            step()
        peak, held = live.peak, live.now
        tiny = contenders.batches(contender.model.config.vocab_size, 1, 2, mesh.device, seed=0)
        live.peak = live.now
        contender.forward_backward(next(tiny))
        contender.update()
        without_activations = live.peak
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    phases = {"forward_backward": [], "update": []}
    for _ in range(options.steps):
        phases["forward_backward"].append(measure.seconds(backward))
        phases["update"].append(measure.seconds(contender.update))
    return {
        "load_s": loaded - began,
        "set_up_s": set_up,
        "forward_backward_s": statistics.median(phases["forward_backward"]),
        "update_s": statistics.median(phases["update"]),
        "peak_bytes": peak,
        "held_bytes": held,
        "without_activations_bytes": without_activations,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "state_bytes": contender.state_bytes(),
        "checkpoint_bytes": contender.checkpoint_bytes(),
        "exchanged_bytes": {name: dict(found) for name, found in traffic.by_group.items()},
        "loss": contender.forward_backward(next(batches)),
        "operations_a_token": _operations(contender.model, options) if kind == "liftdist" else None,
    }


def _operations(model: torch.nn.Module, options: argparse.Namespace) -> int:
    config = measure.config()
    config.data.max_length = options.length
    return footprint.operations(shapes.sizes(model, config), config)


def make_model(options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    if options.synthetic:
        return contenders.synthetic(MODELS[options.synthetic] | {"num_hidden_layers": options.layers}, device)
    return contenders.load(options.model, device)


def main() -> None:
    parser = measure.parser("compare", __doc__, ranks=torch.cuda.device_count() or 2)
    parser.add_argument("--rows", type=int, default=2, help="sequences per rank")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--full-bf16", action="store_true", help="full fine-tuning in pure bf16: 8 B per parameter")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round")
    parser.add_argument("--synthetic", choices=list(MODELS), help="random weights of this shape instead of a model")
    parser.add_argument("--layers", type=int, default=32, help="layers of a synthetic model")
    parser.add_argument("--kinds", nargs="+", default=list(COMPARED), choices=list(contenders.KINDS))
    parser.add_argument("--base-dtype", choices=("int8", "fp8", "nf4"), help="model.base_dtype of liftdist's side")
    parser.add_argument("--on-host", action="store_true", help="optimizer.device=cpu of liftdist's side")
    options = measure.on_ranks(parser)
    config = measure.config()
    config.model.base_dtype = options.base_dtype
    config.optimizer.device = "cpu" if options.on_host else None
    visits: dict[str, list[dict[str, Any]]] = {kind: [] for kind in options.kinds}
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        for number in range(options.rounds):
            for kind in options.kinds:
                visits[kind].append(measured(kind, options, config, mesh))
                if mesh.is_main:
                    last = visits[kind][-1]
                    print(
                        f"round {number + 1}: {kind:9s} forward-backward {last['forward_backward_s']:.3f} s, "
                        f"update {last['update_s']:.4f} s",
                        flush=True,
                    )
                    measure.write({"visits": visits}, options.out)  # in case a later one does not finish
        world = dist.get_world_size()
    if os.environ["RANK"] == "0":
        results = summary(visits, options.rows * options.length * options.micro_batches * world, world)
        report(results)
        measure.write(
            {"ranks": world, "rows": options.rows, "length": options.length, "results": results, "visits": visits},
            options.out,
        )


def summary(visits: dict[str, list[dict[str, Any]]], tokens: int, ranks: int) -> dict[str, dict[str, Any]]:
    """Medians over the visits, bytes of the last one. ``tokens``: per step, over all ranks."""
    results = {}
    for kind, found in visits.items():
        result = dict(found[-1])
        for key in ("set_up_s", "forward_backward_s", "update_s"):
            result[key] = statistics.median(visit[key] for visit in found)
        result["tokens_per_second"] = tokens / (result["forward_backward_s"] + result["update_s"])
        result["sent_bytes"] = sum(size for group in result["exchanged_bytes"].values() for _, size in group.values())
        if operations := result["operations_a_token"]:  # without recomputation
            result["tflops"] = operations * result["tokens_per_second"] / ranks / 1e12
        results[kind] = result
    return results


def report(results: dict[str, dict[str, Any]]) -> None:
    print(f"{measure.machine()}, torch {torch.__version__}")
    rows = [
        ("tokens/s", "tokens_per_second", 1, 0), ("set-up s", "set_up_s", 1, 1),
        ("forward-backward s", "forward_backward_s", 1, 3), ("update s", "update_s", 1, 4),
        ("peak MiB", "peak_bytes", 2**20, 0), ("held between steps", "held_bytes", 2**20, 0),
        ("peak with 2 tokens", "without_activations_bytes", 2**20, 0), ("optimizer state MiB", "state_bytes", 2**20, 1),
        ("checkpoint MiB", "checkpoint_bytes", 2**20, 1), ("into collectives MiB", "sent_bytes", 2**20, 1),
        ("loss", "loss", 1, 4),
    ]  # fmt: skip
    print(f"{'':22s}" + "".join(f"{kind:>12s}" for kind in results))
    for title, key, unit, digits in rows:
        print(f"{title:22s}" + "".join(f"{result[key] / unit:12,.{digits}f}" for result in results.values()))
    for kind, result in results.items():
        if result.get("tflops"):
            print(f"{kind}: {result['tflops']:.3g} TFLOP/s per rank, of {measure.tflops()} by the data sheet")


if __name__ == "__main__":
    main()
