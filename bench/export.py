"""What `liftdist export` costs of a run, against `python -c "import torch"` in the same round.

    python -m bench export [--model FOLDER] [--rounds 3] [--out FILE]

A run of two steps, of 5 % of each matrix by magnitude, on one rank; then its newest checkpoint is exported as a patch, a delta,
and a whole model. Of each the seconds of the whole command, and its processor time, which other load disturbs less. The digest
of the base model is cached by the run. One round goes first and does not count.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import measure

FORMATS = ("patch", "delta", "hf")
SETTINGS = """
selection: {density: 0.05, criterion: magnitude}
optimizer: {lr: 0.05, schedule: constant, warmup_ratio: 0}  # so that every weight changes
train: {steps: 2}
"""


def train(folder: Path, model: Path) -> None:
    """A run in ``folder / "run"``."""
    folder.joinpath("data.jsonl").write_text('{"prompt": "2 plus 3 is", "completion": " 5"}\n' * 40)
    folder.joinpath("config.yaml").write_text(SETTINGS)
    settings = {
        "run_dir": folder / "run",
        "cache_dir": folder / "cache",
        "model.path": model,
        "data.path": folder / "data.jsonl",
    }
    command = [sys.executable, "-m", "liftdist", "train", str(folder / "config.yaml"), "--nproc=1"]
    subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=True)


def timed(*words: str | Path) -> dict[str, float]:
    """Wall and processor time of Python with ``words``."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "busy": spent}


def main() -> None:
    parser = measure.parser("export", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, options.model.resolve())
        export = "-m", "liftdist", "export", folder / "run", "--cache-dir", folder / "cache", "--output", folder / "out"
        for number in range(options.rounds + 1):
            found = {"torch": timed("-c", "import torch")}
            for form in FORMATS:
                found[form] = timed(*export, "--format", form)
                made = folder / "out"
                sizes[form] = sum(path.stat().st_size for path in (made, *made.glob("*")) if path.is_file())
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            for what, times in found.items() if number else ():
                for kind, seconds in times.items():
                    rounds.setdefault(f"{what} {kind}", []).append(seconds)
    for key, seconds in rounds.items():
        what, kind = key.split()
        over = measure.ratio(rounds, key, f"torch {kind}")
        print(f"{what:8}{kind:6}{statistics.median(seconds):6.2f} s{over:6.2f} x")
    medians = {key: statistics.median(seconds) for key, seconds in rounds.items()}
    measure.write({"sizes": sizes, "results": medians, "rounds": rounds}, options.out)


if __name__ == "__main__":
    main()
