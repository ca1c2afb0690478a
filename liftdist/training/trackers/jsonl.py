"""``metrics.jsonl``: one JSON object a line, with ``step``, ``time`` and the figures by tag; null for what is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from liftdist import files

NAME = "metrics.jsonl"


class Jsonl:
    def __init__(self, run_dir: Path, after: int | None) -> None:
        path = run_dir / NAME
        if after is not None and path.exists() and not path.is_symlink():
            with path.open(encoding="utf-8") as earlier:
                files.write(path, "".join(line for line in earlier if _step(line) <= after))
        self._file = files.open_to_append(path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()

    def text(self, tag: str, text: str) -> None:
        """Texts are for people, and stand in other files of the run directory."""

    def close(self) -> None:
        self._file.close()


def start(run_dir: Path, after: int | None) -> Jsonl:
    return Jsonl(run_dir, after)


def _step(line: str) -> float:
    """The step of a line of metrics; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
