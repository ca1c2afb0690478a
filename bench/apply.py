"""How long `liftdist apply` takes in place, against a plain copy of the folder in the same round.

    python -m bench apply [--gib 4] [--files 4] [--rounds 3] [--folder FOLDER] [--out FILE]

A folder of random bf16 weights, and a delta of 5 % of them at random places, which is applied and undone. The copy is `cp -r` and
`sync`. Before each command the pages of all files are dropped, and no digest is cached: `apply` reads all weights to know the
base model, and writes all of them to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import measure
from liftdist import safetensors_io
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, Delta
from liftdist.models import check, weights
from liftdist.models.weights import ModelFolder

SHAPE = 8192, 4096  # 64 MiB a tensor


def make_model(folder: Path, gib: float, files: int) -> None:
    folder.mkdir()
    number, where = max(files, round(gib * 2**30 / (2 * SHAPE[0] * SHAPE[1]))), {}
    for file in range(files):
        name = f"model-{file + 1:05}-of-{files:05}.safetensors"
        tensors = {f"model.layers.{i}.weight": torch.randn(SHAPE).bfloat16() for i in range(file, number, files)}
        safetensors_io.save(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    size = 2 * number * SHAPE[0] * SHAPE[1]
    (folder / check.INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def make_delta(folder: Path, path: Path, cache_dir: Path) -> None:
    stored = ModelFolder(folder)

    def get(name: str) -> Change:
        tensor = stored.read(name)
        flat = torch.rand(tensor.shape).flatten().lt(0.05).nonzero().squeeze(1)
        base = tensor.flatten()[flat]
        return Change(tuple(tensor.shape), tensor.dtype, flat, base + 1, base)

    delta_file.write(Delta(path, weights.digest(folder, cache_dir), list(stored.file_of), get, {}), path)


def drop_pages(folder: Path) -> None:
    """Write what is not on the disk, and drop what is in memory, of all files in ``folder``."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(folder: Path, *command: str | Path) -> float:
    drop_pages(folder)
    began = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench apply", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4, help="size of the model")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write the model, the copy and the delta; else among temporary files"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    rounds: dict[str, list[float]] = {"copy": [], "apply": [], "undo": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        top = Path(made)
        model, delta = top / "model", top / "a.delta"
        make_model(model, options.gib, options.files)
        make_delta(model, delta, top / "cache")
        apply = sys.executable, "-m", "liftdist", "apply", delta, model, "--cache-dir", top / "unused"
        for _ in range(options.rounds):
            copied = f'cp -r "{model}" "{top}/copy" && sync -f "{top}/copy"'
            rounds["copy"].append(timed(top, "sh", "-c", copied))
            shutil.rmtree(top / "copy")
            for name, words in (("apply", ()), ("undo", ("--undo",))):
                shutil.rmtree(top / "unused", ignore_errors=True)
                rounds[name].append(timed(top, *apply, *words))
        sizes = {"model": sum(path.stat().st_size for path in model.iterdir()), "delta": delta.stat().st_size}
    found = {name: statistics.median(taken) for name, taken in rounds.items()}
    found["speed_of_a_copy"] = measure.ratio(rounds, "copy", "apply")
    print(f"{measure.machine()}, torch {torch.__version__}, {sizes['model'] / 2**30:.2f} GiB in {options.files} files")
    print(", ".join(f"{name} {statistics.median(taken):.1f} s" for name, taken in rounds.items()))
    print(f"apply has {found['speed_of_a_copy']:.2f} of the speed of a copy")
    measure.write({"sizes": sizes, "results": found, "rounds": rounds}, options.out)


if __name__ == "__main__":
    main()
