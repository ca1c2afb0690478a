"""``metrics.jsonl``: one JSON object per line, with ``step``, ``time`` and the metrics by tag; null if not finite."""

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
        """Ignored: the run directory holds the texts in other files."""

    def close(self) -> None:
        self._file.close()


def start(run_dir: Path, after: int | None) -> Jsonl:
    return Jsonl(run_dir, after)


def _step(line: str) -> float:
    """The step of a line of metrics; infinite for a truncated line, which is then removed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
