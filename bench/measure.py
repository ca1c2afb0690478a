"""What the benchmarks share: ranks to run on, clocks, and the words for what they ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from liftdist.planning import plan
from liftdist.schema import Config


def machine() -> str:
    """The processor, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def tflops() -> float | None:
    """Of the GPU, dense bf16, by its data sheet."""
    name = machine().lower()
    return next((gpu.tflops for key, gpu in plan.GPUS.items() if key.split("-")[0] in name), None)


def parser(name: str, description: str | None, ranks: int) -> argparse.ArgumentParser:
    """The options of a benchmark that trains or loads a model on ``ranks`` ranks unless told otherwise."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--ranks", type=int, default=ranks)
    made.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    made.add_argument("--out", type=Path, help="JSON file for the results")
    return made


def on_ranks(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, on each of the ranks that they ask for: outside of them the benchmark is started again, and awaited."""
    options = made.parse_args()
    _start_ranks(f"bench.{made.prog.split()[-1]}", options.ranks)
    return options


def config() -> Config:
    """What all benchmarks train: 5 % of each matrix."""
    made = Config(run_dir="none")
    made.selection.density = 0.05
    return made


def _start_ranks(module: str, ranks: int) -> None:
    if "RANK" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), "HF_HUB_OFFLINE": "1"}
    sys.exit(subprocess.run([*torchrun, "-m", module, *sys.argv[1:]], env=environment, check=False).returncode)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of a call, all ranks and the device at rest before and after; and what it returned."""
    _rest()
    began = time.perf_counter()
    result = function()
    _rest()
    return time.perf_counter() - began, result


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call, as :func:`timed`."""
    return timed(function)[0]


def busy_seconds(function: Callable[[], Any]) -> float:
    """Processor time of a call, which other work on the machine disturbs less; on a GPU wall time."""
    if torch.cuda.is_available():
        return seconds(function)
    began = time.process_time()
    function()
    return time.process_time() - began


def _rest() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def ratio(rounds: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of ``over / under``."""
    return statistics.median(a / b for a, b in zip(rounds[over], rounds[under], strict=True))


def write(results: dict[str, Any], out: Path | None) -> None:
    """With what it was measured on, to ``out``."""
    if out:
        on = {"device": machine(), "torch": torch.__version__}
        out.write_text(json.dumps(on | results, indent=1) + "\n")
