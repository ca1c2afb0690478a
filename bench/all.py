"""Run every benchmark that this machine supports, one after the other; results go to bench/results.

    python -m bench all [--only NAME ...] [--out FOLDER]

With a GPU: Llama-3-8B shapes on one GPU, within ten minutes. Without: SmolLM2-135M of launch/quickstart, about half an hour.
A benchmark that fails or exceeds its time limit is reported, and the next one starts.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ON_CPU = {
    "selection": "selection --large --ranks 64 --processes 2",
    "step": "step --length 512",
    "memory": "memory",
    "traffic": "traffic",
    "load": "load",
    "checkpoint": "checkpoint",
    "compare": "compare",
    "scale": "scale --ranks 8 1024",
    "apply": "apply --gib 8",
    "export": "export",
}
ON_GPU = {
    "selection": "selection --synthetic 8b --ranks 64",
    "step": "step --synthetic 8b --length 2048 --rows 1 --layers 8 --rounds 5",
    "compare-1x2048": "compare --synthetic 8b --length 2048 --rows 1 --rounds 1 --full-bf16 --kinds full lora liftdist",
    "compare-16x2048": "compare --synthetic 8b --length 2048 --rows 1 --micro-batches 16 --rounds 1 --steps 1 --full-bf16 "
    "--kinds full lora liftdist",
}
LIMIT = {"cpu": 1200, "gpu": 145}  # seconds per benchmark


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="run only these benchmarks")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    kind, commands = ("gpu", ON_GPU) if torch.cuda.is_available() else ("cpu", ON_CPU)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.only or commands:
        command = [
            sys.executable,
            "-m",
            "bench",
            *commands[name].split(),
            "--out",
            str(options.out / f"{name}-{kind}.json"),
        ]
        print(f"== {' '.join(command[1:])}", flush=True)
        began = time.perf_counter()
        running = subprocess.Popen(command, start_new_session=True)
        try:
            code = running.wait(LIMIT[kind])
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with its ranks, which hold the GPU
            running.wait()
            code = f"not finished within {LIMIT[kind]} s"
        if code:
            failed.append(f"{name}: {code}")
        print(f"== {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
