"""Files of a run directory with one JSON object a line, each with its ``step``, to which a run that continues appends."""

from __future__ import annotations

import json
import math
from io import TextIOWrapper
from pathlib import Path

from liftdist import files


def open_after(path: Path, after: int | None) -> TextIOWrapper:
    """Open a file to append to, without the lines of steps beyond ``after``, the last that is kept; None keeps all.

    A truncated line, which a killed process leaves, is removed, too.
    """
    if after is not None and path.exists() and not path.is_symlink():
        with path.open(encoding="utf-8") as earlier:
            files.write(path, "".join(line for line in earlier if _step(line) <= after))
    return files.open_to_append(path)


def _step(line: str) -> float:
    """The step of a line; infinite for a truncated one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
