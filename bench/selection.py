"""The fast selection against the full SVD: time and overlap of indices, on a real model and on large matrices.

python -m bench selection [--model FOLDER] [--large] [--ranks 32 64 128] [--processes 2] [--out FILE]

CPU: process time of one thread, alternating between the methods for each matrix. GPU: wall time after a warm-up.
--processes also compares the wall time of the whole model's selection on that many ranks with one rank.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench import measure
from bench.contenders import slow_spectrum
from bench.scale import MODELS
from liftdist.engine.criteria import low_rank


def timed(device: torch.device, function):
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        return result, time.perf_counter() - start
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def compare(weight: torch.Tensor, filter_rank: int) -> dict[str, float]:
    k = round(0.05 * weight.numel())
    fast, fast_s = timed(weight.device, lambda: low_rank.select(weight, k, filter_rank, "fast"))
    exact, exact_s = timed(weight.device, lambda: low_rank.select(weight, k, filter_rank, "exact"))
    overlap = torch.isin(fast, exact, assume_unique=True).double().mean().item()
    return {"fast_s": fast_s, "exact_s": exact_s, "overlap": overlap}


def whole_model(name: str, filter_rank: int, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds to select in all matrices; then also the seconds for full SVDs of all, extrapolated from one per shape."""
    from bench.contenders import synthetic
    from liftdist import PrincipalWeights

    model = synthetic(MODELS[name], device)
    principal = PrincipalWeights(model, density=0.05, filter_rank=filter_rank)
    selecting = measure.seconds(principal.select)
    found = {"matrices": len(principal.matrices), "fast_s": selecting}
    yield found
    shapes = Counter(matrix.shape for matrix in principal.matrices)
    samples = {matrix.shape: matrix.rows_local for matrix in principal.matrices}
    full = sum(
        count * measure.seconds(lambda shape=shape: torch.linalg.svd(samples[shape].float(), full_matrices=False))
        for shape, count in shapes.items()
    )
    yield found | {"svd_s": full, "ratio": full / selecting}


def on_processes(options: argparse.Namespace) -> dict[str, object]:
    """Wall time of the whole model's selection on one rank and on several, alternating; one thread per rank."""
    taken: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for ranks, found in taken.items():
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*torchrun, "-m", "bench.selection", "--as-rank", "--model", str(options.model)]
            done = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
            )
            found.append(float(done.stdout.split()[-1]))
    ratios = [one / several for one, several in zip(taken[1], taken[options.processes], strict=True)]
    return {"seconds": taken, "ratio": statistics.median(ratios)}


def as_rank(folder: Path) -> None:
    """Shard, then select; rank 0 prints the seconds."""
    from bench import contenders
    from liftdist.distributed import mesh as meshes

    config = measure.config()
    with meshes.start(config.mesh.layout, config.mesh.timeout) as mesh:
        side = contenders.Liftdist(contenders.load(folder, mesh.device), config, mesh)
        taken = measure.seconds(side.principal.select)
        if mesh.is_main:
            print(taken)


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    fast, exact = sum(r["fast_s"] for r in rows), sum(r["exact_s"] for r in rows)
    overlaps = [r["overlap"] for r in rows]
    return {
        "matrices": len(rows),
        "fast_s": round(fast, 3),
        "exact_s": round(exact, 3),
        "ratio": round(exact / fast, 2),
        "overlap_mean": sum(overlaps) / len(overlaps),
        "overlap_worst": min(overlaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--large", action="store_true", help="4096 x 4096 and 11008 x 4096, too (minutes)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument(
        "--synthetic", choices=list(MODELS), help="a whole model of this shape; full SVDs of one per shape"
    )
    parser.add_argument("--processes", type=int, help="time a selection on this many ranks against one")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --processes")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if options.as_rank:
        as_rank(options.model)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    results: dict = {"density": 0.05, "results": {}}
    if options.synthetic:
        for rank in options.ranks:
            for found in whole_model(options.synthetic, rank, device):
                results["results"][f"{options.synthetic}, r={rank}"] = found
                figures = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
                print(f"{options.synthetic}, r={rank}: {figures}", flush=True)
                measure.write(results, options.out)  # the SVDs that follow may take too long
        return
    weights = [w.to(device).float() for n, w in load_file(options.model / "model.safetensors").items() if "_proj" in n]
    for rank in options.ranks:
        compare(weights[0], rank)  # warm-up
        results["results"][f"{options.model.name} r={rank}"] = summary([compare(w, rank) for w in weights])
    for m, n in ((4096, 4096), (11008, 4096)) if options.large else ():
        weight = slow_spectrum(m, n, device)
        for rank in options.ranks:
            results["results"][f"{m} x {n}, s_i ~ i^-0.4, r={rank}"] = summary([compare(weight, rank)])
    print(f"{measure.machine()}, torch {torch.__version__}")
    print(f"{'':44s} {'exact s':>9s} {'fast s':>9s} {'ratio':>7s} {'overlap mean':>13s} {'worst':>9s}")
    for name, r in results["results"].items():
        print(
            f"{name:44s} {r['exact_s']:9.2f} {r['fast_s']:9.2f} {r['ratio']:7.2f} "
            f"{r['overlap_mean']:13.5f} {r['overlap_worst']:9.5f}"
        )
    if options.processes:
        results["processes"] = on_processes(options)
        print(f"{options.processes} ranks against one: {results['processes']['ratio']:.2f} times faster")
    measure.write(results, options.out)


if __name__ == "__main__":
    main()
