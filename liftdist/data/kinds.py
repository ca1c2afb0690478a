"""The kinds of files that hold records, by their suffixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from liftdist.data.reading import FileSource
from liftdist.data.tables import ArrowSource, ParquetSource
from liftdist.data.texts import OPEN as COMPRESSIONS
from liftdist.data.texts import CsvSource, TsvSource, json_source
from liftdist.errors import UserError

_TEXTS: dict[str, Callable[[Path, str], FileSource]] = {
    ".jsonl": json_source, ".ndjson": json_source, ".json": json_source, ".csv": CsvSource, ".tsv": TsvSource,
}  # fmt: skip
_TABLES: dict[str, Callable[[Path, str], FileSource]] = {".parquet": ParquetSource, ".arrow": ArrowSource}
SUFFIXES = (*_TEXTS, *_TABLES)
KNOWN = f"{', '.join(SUFFIXES)}; text files also with {', '.join(COMPRESSIONS)} after that"


def open_as(kind: str, file: Path, name: str) -> FileSource:
    """The records of a file of a kind, which messages call ``name``. Raises ``UserError``."""
    return {**_TEXTS, **_TABLES}[kind](file, name)


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of a compression; None if it is none of those known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in _TEXTS else None
    return suffix if suffix in SUFFIXES else None


def of_one_kind(path: str, files: list[Path]) -> list[Path]:
    """Raises ``UserError`` if the files are of several kinds, or one of them of none, or two hold the same."""
    for file in files:
        if kind_of(file) is None:
            raise UserError(f"data {file}: must end in {KNOWN}")
    kinds = {".json" if _TEXTS.get(kind) is json_source else kind for file in files if (kind := kind_of(file))}
    if len(kinds) > 1:
        raise UserError(
            f"data {path}: holds files of several kinds ({', '.join(sorted(kinds))}); name those of one: *.jsonl"
        )
    seen: dict[str, Path] = {}
    for file in files:
        bare = str(file).removesuffix(file.suffix) if file.suffix.lower() in COMPRESSIONS else str(file)
        if bare in seen:
            raise UserError(f"data {path}: {seen[bare].name} and {file.name} look like the same data; name one of them")
        seen[bare] = file
    return files
