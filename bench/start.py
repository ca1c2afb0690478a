"""How long `liftdist train` takes to begin, against `python -c "import torch"` in the same round.

    python -m bench start [--ranks 2] [--rounds 3] [--model FOLDER] [--out FILE]

    met         a rank has met the others: it begins to import transformers
    claimed     the run directory is claimed
    read        the data is tokenised, and the model has been read

Of each the seconds since the command was given, and the processor time of all its processes until then, which other load disturbs
less. One round goes first and does not count: it fills the caches of files and of tokens. The command is killed when it has read.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import measure

_TICKS = os.sysconf("SC_CLK_TCK")
_POLL = 0.005  # seconds


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


def busy(pid: int) -> float:
    """Processor time of a process, of all below it, and of those of them that have ended, in seconds."""
    ticks = 0
    for one in tree(pid):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()[11:15]))
    return ticks / _TICKS


def has_met(pid: int) -> bool:
    """Whether a rank below a process has mapped what transformers imports first, which it does when its group has met."""
    for one in tree(pid):
        with contextlib.suppress(OSError):
            if "/regex/_regex" in Path(f"/proc/{one}/maps").read_text():
                return True
    return False


def import_torch() -> dict[str, float]:
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    wall, after = time.perf_counter() - began, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": wall, "busy": spent}


def train(folder: Path, model: Path, ranks: int) -> dict[str, dict[str, float]]:
    """Wall and processor time of ``liftdist train`` until ``met``, ``claimed`` and ``read``."""
    run_dir, said = Path(tempfile.mkdtemp(dir=folder)), folder / "stderr"
    settings = {
        "run_dir": run_dir,
        "cache_dir": folder / "cache",
        "model.path": model,
        "data.path": folder / "data.jsonl",
    }
    command = [sys.executable, "-m", "liftdist", "train", str(folder / "config.yaml"), f"--nproc={ranks}"]
    command += [f"{key}={value}" for key, value in settings.items()]
    marks: dict[str, Callable[[int], bool]] = {
        "met": has_met,
        "claimed": lambda _: any((run_dir / "attempts").glob("attempt-*.jsonl")),
        "read": lambda _: "selecting principal weights" in said.read_text(),
    }
    found, began = {}, time.perf_counter()
    with said.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for name, is_reached in marks.items():
                while not is_reached(process.pid):
                    if process.poll() is not None:
                        sys.exit(said.read_text())
                    time.sleep(_POLL)
                found[name] = {"wall": time.perf_counter() - began, "busy": busy(process.pid)}
        finally:
            process.kill()
    return found


def main() -> None:
    parser = measure.parser("start", __doc__, ranks=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.joinpath("data.jsonl").write_text('{"prompt": "2 plus 3 is", "completion": " 5"}\n' * 40)
        folder.joinpath("config.yaml").write_text("selection: {density: 0.05}\ntrain: {steps: 1}\n")
        for number in range(options.rounds + 1):
            found = {"torch": import_torch(), **train(folder, options.model.resolve(), options.ranks)}
            for what, times in found.items() if number else ():
                for kind, seconds in times.items():
                    rounds.setdefault(f"{what} {kind}", []).append(seconds)
    results = {"ranks": options.ranks, "seconds": rounds, "over_torch": {}}
    for key, seconds in rounds.items():
        what, kind = key.split()
        over = measure.ratio(rounds, key, f"torch {kind}")
        results["over_torch"][key] = over
        print(f"{what:8}{kind:6}{statistics.median(seconds):6.2f} s{over:6.2f} x")
    measure.write(results, options.out)


if __name__ == "__main__":
    main()
