"""Parts of tokenised data: folders that are filled elsewhere and appear whole.

    part-000000/samples.arrow       an Arrow stream: input_ids, labels, weights, length, learned, record, place
    part-000000/counts.json         how many samples, and what became of the records

Must not know how samples are made.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from liftdist import files

RECORDS = 2048  # records of a part
_BATCH_TOKENS = 1 << 22  # after which a part is written so far: memory does not grow with data.max_length
_ABANDONED = 86400.0  # seconds in which nobody has begun or finished a part
_LISTED = 2.0  # seconds between two counts of the parts that are complete
_SAMPLES, _COUNTS = "samples.arrow", "counts.json"

Row = dict[str, Any]  # input_ids, labels, weights (None: all are 1), length, learned, record, place


def path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}"


def _schema() -> Any:
    import pyarrow

    tokens = pyarrow.list_(pyarrow.int32())
    numbers = {name: pyarrow.int64() for name in ("length", "learned", "record")}
    columns = {"input_ids": tokens, "labels": tokens, "weights": pyarrow.list_(pyarrow.float32()), **numbers}
    return pyarrow.schema({**columns, "place": pyarrow.string()})


def write(target: Path, unfinished: Path, chunks: Iterator[Sequence[Row]], counts: Mapping[str, Any]) -> None:
    """Fill a folder in the folder ``unfinished``, and publish it as ``target``, unless another process has.

    Args:
        counts: what became of the records; complete once the chunks of samples have been taken.
    """
    import pyarrow

    unfinished.mkdir(parents=True, exist_ok=True)
    folder = unfinished / target.name
    folder.mkdir()
    kept = tokens = 0
    batches: list[Any] = []
    with pyarrow.OSFile(str(folder / _SAMPLES), "wb") as file, pyarrow.ipc.new_stream(file, _schema()) as stream:

        def put() -> None:
            stream.write_table(pyarrow.Table.from_batches(batches, _schema()).combine_chunks())
            batches.clear()

        for rows in chunks:
            batches.append(pyarrow.RecordBatch.from_pylist(rows, schema=_schema()))
            kept, tokens = kept + len(rows), tokens + sum(row["length"] for row in rows)
            if tokens > _BATCH_TOKENS:
                put()
                tokens = 0
        put()
    (folder / _COUNTS).write_text(json.dumps({"kept": kept, **counts}))
    try:
        files.publish(folder, target)
    except OSError:
        if not target.exists():
            raise


def load(parts: Sequence[Path]) -> tuple[Any | None, list[dict[str, Any]]]:
    """The table of the samples of all parts, memory-mapped, None if there are none; and the counts of each part."""
    import pyarrow

    tables, counts = [], []
    for part in parts:
        counts.append(json.loads((part / _COUNTS).read_text()))
        if counts[-1]["kept"]:
            with pyarrow.memory_map(str(part / _SAMPLES)) as file:
                tables.append(pyarrow.ipc.open_stream(file).read_all())
    return (pyarrow.concat_tables(tables) if tables else None), counts


def complete(folder: Path) -> set[int]:
    """The numbers of the parts that are there."""
    return {int(part.name.removeprefix("part-")) for part in folder.glob("part-*")}


def known_count(folder: Path) -> int | None:
    """The number of records of complete parts; None if one is missing, or the number is."""
    with contextlib.suppress(OSError, ValueError):
        count = int((folder / "records").read_text())
        return count if len(complete(folder)) * RECORDS >= count else None
    return None


def remember_count(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "records", str(count))


def unfinished(folder: Path) -> Path:
    """A new name for a folder in which parts are filled."""
    return files.name_beside(folder / "parts")


def clean(folder: Path) -> None:
    """Remove what processes have left that were killed before they could remove it."""
    for left in folder.glob(".parts-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)


class Shown:
    """Shows how many records all ranks have tokenised, whenever this one has made some more."""

    def __init__(self, folder: Path, total: int, show: Callable[[int, int], None]) -> None:
        self._folder, self._total, self._show = folder, total, show
        self._done, self._complete, self._listed = 0, 0, float("-inf")

    def __call__(self, unfinished: int = 0) -> None:
        """``unfinished``: records that are tokenised in parts that are not complete."""
        if time.monotonic() - self._listed > _LISTED:
            self._complete = RECORDS * len(complete(self._folder))
            self._listed = time.monotonic()
        self._done = max(self._done, min(self._complete + unfinished, self._total))
        self._show(self._done, self._total)
