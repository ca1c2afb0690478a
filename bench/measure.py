"""Shared by the benchmarks: options, starting ranks, timing, and the description of the machine."""

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
    """The name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def tflops() -> float | None:
    """Peak TFLOP/s of the GPU, dense bf16, from its data sheet; None if unknown."""
    name = machine().lower()
    return next((gpu.tflops for key, gpu in plan.GPUS.items() if key.split("-")[0] in name), None)


def parser(name: str, description: str | None, ranks: int | None = None) -> argparse.ArgumentParser:
    """Common options of benchmarks that train or load a model; ``ranks`` is the default of ``--ranks``, which else is none."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if ranks is not None:
        made.add_argument("--ranks", type=int, default=ranks)
    made.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    made.add_argument("--out", type=Path, help="JSON file for the results")
    return made


def on_ranks(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options. Outside of torchrun, start the benchmark again on ``--ranks`` ranks, wait, and exit."""
    options = made.parse_args()
    _start_ranks(f"bench.{made.prog.split()[-1]}", options.ranks)
    return options


def config() -> Config:
    """The config of all benchmarks: 5 % of each matrix are trained."""
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
    """Wall time of a call in seconds, with all ranks and the device synchronised before and after; and its result."""
    _synchronise()
    began = time.perf_counter()
    result = function()
    _synchronise()
    return time.perf_counter() - began, result


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call in seconds, as :func:`timed`."""
    return timed(function)[0]


def busy_seconds(function: Callable[[], Any]) -> float:
    """Processor time of a call in seconds, which other load disturbs less; on a GPU wall time."""
    if torch.cuda.is_available():
        return seconds(function)
    began = time.process_time()
    function()
    return time.process_time() - began


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def ratio(rounds: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of ``over / under``."""
    return statistics.median(a / b for a, b in zip(rounds[over], rounds[under], strict=True))


def write(results: dict[str, Any], out: Path | None) -> None:
    """Write ``results``, with the device and torch's version, to ``out``."""
    if out:
        machine_facts = {"device": machine(), "torch": torch.__version__}
        out.write_text(json.dumps(machine_facts | results, indent=1) + "\n")
