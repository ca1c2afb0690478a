"""The fast selection against the full SVD: time and overlap, on a real model and on large matrices.

python -m bench selection [--model FOLDER] [--large] [--ranks 32 64 128] [--out FILE]

CPU: process time of one thread, the two methods taken in turn on each matrix. GPU: wall time after a warm-up.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from liftdist import lowrank


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
    fast, fast_s = timed(weight.device, lambda: lowrank.select(weight, k, filter_rank, "fast"))
    exact, exact_s = timed(weight.device, lambda: lowrank.select(weight, k, filter_rank, "exact"))
    overlap = torch.isin(fast, exact, assume_unique=True).double().mean().item()
    return {"fast_s": fast_s, "exact_s": exact_s, "overlap": overlap}


def slow_spectrum(m: int, n: int, device: torch.device, power: float = 0.4) -> torch.Tensor:
    """``[m, n]`` with singular values ``i ** -power``."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, n, generator=generator).to(device)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator).to(device)).Q
    return (u * torch.arange(1, n + 1, device=device).float() ** -power) @ v.T


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
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    models = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
    on = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{models[0] if models else platform.machine()}, one thread"
    )
    results: dict = {"device": on, "torch": torch.__version__, "density": 0.05, "results": {}}
    weights = [w.to(device).float() for n, w in load_file(options.model / "model.safetensors").items() if "_proj" in n]
    for rank in options.ranks:
        compare(weights[0], rank)  # warm-up
        results["results"][f"{options.model.name} r={rank}"] = summary([compare(w, rank) for w in weights])
    for m, n in ((4096, 4096), (11008, 4096)) if options.large else ():
        weight = slow_spectrum(m, n, device)
        for rank in options.ranks:
            results["results"][f"{m} x {n}, s_i ~ i^-0.4, r={rank}"] = summary([compare(weight, rank)])
    print(f"{on}, torch {torch.__version__}")
    print(f"{'':44s} {'exact s':>9s} {'fast s':>9s} {'ratio':>7s} {'overlap mean':>13s} {'worst':>9s}")
    for name, r in results["results"].items():
        print(
            f"{name:44s} {r['exact_s']:9.2f} {r['fast_s']:9.2f} {r['ratio']:7.2f} "
            f"{r['overlap_mean']:13.5f} {r['overlap_worst']:9.5f}"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
