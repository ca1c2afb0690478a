"""``metrics.jsonl``: one JSON object per line, with ``step``, ``time`` and the metrics by tag; null if not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from liftdist.runs import layout, lines


class Jsonl:
    def __init__(self, run_dir: Path, after: int | None) -> None:
        self._file = lines.open_after(run_dir / layout.METRICS, after)

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
