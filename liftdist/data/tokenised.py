"""Tokenised samples in the cache.

    CACHE_DIR/tokens/KEY/part-000000/       an Arrow table of 2048 records, and counts.json

The key is a digest of the data's contents and of everything that determines its tokens. Every rank tokenises missing
parts until all exist, so that no rank waits for another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liftdist import files
from liftdist.data import records, sources
from liftdist.data.chat import Encoded, Encoder
from liftdist.data.content import Content, digest, unread
from liftdist.errors import UserError
from liftdist.schema import DataConfig, DataSource

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # label of a token that does not count towards the loss
#: Settings that do not affect tokens; all others are part of the cache key.
NOT_IN_TOKENS = (
    "key",
    "name",
    "path",
    "revision",
    "subset",
    "split",
    "weight",
    "samples",
    "sources",
    "eval_path",
    "eval_revision",
    "eval_subset",
    "eval_split",
    "eval_sources",
    "eval_share",
    "packing",
)
FORMAT = 4  # version of the layout of parts
PART_RECORDS = 2048  # records per part
FIRST_PLACES = 3  # that are named of what was left out

# what becomes of records besides being samples; all but the first two leave them out
TRUNCATED = "truncated to data.max_length"
SPLIT = "split into a sample for each reply"
TOO_LONG = "left out: longer than data.max_length"
CUT_OFF = "left out: nothing to learn within data.max_length"
NOTHING = "left out: nothing to learn in them"
FILES = "files"
# what records hold that does not reach the tokens
UNUSED = "fields that are not used"
UNREAD = "keys that the chat template does not read"


@dataclass
class Report:
    """How many records met with what, the places of the first of them, and the names of what does not reach the tokens."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, place: str) -> None:
        self.counts[what] += 1
        self.places.setdefault(what, [])
        self.places[what] = [*self.places[what], place][:FIRST_PLACES]

    def name(self, what: str, names: Iterable[str]) -> None:
        known = self.names.setdefault(what, [])
        known += [name for name in names if name not in known]

    def merge(self, counts: dict[str, int], places: dict[str, list[str]], names: dict[str, list[str]]) -> None:
        self.counts.update(counts)
        for what, found in names.items():
            self.name(what, found)
        for what, found in places.items():
            self.places[what] = [*self.places.get(what, []), *found][:FIRST_PLACES]

    def lines(self) -> list[str]:
        return [
            f"{count} {what} ({', '.join(self.places[what])}{', ...' if count > FIRST_PLACES else ''})"
            for what, count in self.counts.items()
        ] + [f"{what}: {', '.join(names)}" for what, names in self.names.items() if names]


@dataclass(frozen=True)
class Samples:
    """Tokenised samples, memory-mapped."""

    table: Dataset  # columns: input_ids, labels
    lengths: np.ndarray  # [samples] int64, tokens of each
    learned: np.ndarray  # [samples] int64, learned tokens of each
    records: np.ndarray  # [samples] int64, digest of what the record says that each is of
    report: Report
    digest: str  # of the records and all that determines samples: equal digests mean equal samples
    path: str
    places: Dataset  # column: place

    def where(self, sample: int) -> str:
        """Location of a sample's record: file and line, or name and number of the record."""
        return f"{self.path}:{self.places[sample]['place']}"

    def __len__(self) -> int:
        return len(self.lengths)


def tokenise(
    given: DataSource,
    config: DataConfig,
    encoder: Encoder,
    vocabulary: int,
    cache_dir: Path,
    first_part: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """All samples of a source, from the cache or tokenised now.

    Args:
        config: for what is the same for all sources.
        vocabulary: rows of the model's embedding; a token id outside of it is an error.
        first_part: where among the parts to begin, 0 to 1: ranks that begin apart tokenise different parts.

    Raises:
        UserError: a record that cannot be read (file and line), or no token to train on.
    """
    source, path = sources.open_records(given), given.path
    read = records.reader(source, given)
    key = _key(source, given, config, encoder, vocabulary, cache_dir)
    folder = cache_dir.expanduser() / "tokens" / key
    starts = range(0, len(source), PART_RECORDS)
    parts = [folder / f"part-{number:06d}" for number in range(len(starts))]
    shift = int(first_part * len(parts))
    for done, number in enumerate([*range(shift, len(parts)), *range(shift)]):
        if progress is not None:
            progress(done, len(parts))
        if not parts[number].exists():
            part = source.read(starts[number], starts[number] + PART_RECORDS)
            _write_part(parts[number], *encode_all(part, read, encoder, vocabulary, config, source.place))
    samples, report = _load(parts, key, path)
    report.name(FILES, source.files)
    if samples is None:
        hint = "; raise data.max_length" if report.counts[TOO_LONG] + report.counts[CUT_OFF] else ""
        raise UserError(f"data {path}: nothing to learn: of {len(source)} records {'; '.join(report.lines())}{hint}")
    return samples


def _key(
    source: sources.Source, given: DataSource, config: DataConfig, encoder: Encoder, vocabulary: int, cache_dir: Path
) -> str:
    """The cache key of the tokens: a digest of everything that determines them."""
    settings = asdict(config) | asdict(given)  # of those that both have, the source's hold
    settings = {name: value for name, value in settings.items() if name not in NOT_IN_TOKENS}
    parts = [source.digest(cache_dir), settings, encoder.digest, vocabulary, FORMAT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _load(parts: Sequence[Path], key: str, path: str) -> tuple[Samples | None, Report]:
    """The samples of all parts, None if there are none, and what became of the other records."""
    import datasets

    report, loaded = Report(), []
    for part in parts:
        counts = json.loads((part / "counts.json").read_text())
        report.merge(counts["counts"], counts["places"], counts["names"])
        if counts["kept"]:
            loaded.append(datasets.load_from_disk(str(part)))
    if not loaded:
        return None, report
    table = datasets.concatenate_datasets(loaded)
    lengths, learned, of_records = (
        np.asarray(table.data.column(name).to_numpy(), dtype=np.int64) for name in ("length", "learned", "record")
    )
    tokens, places = table.select_columns(["input_ids", "labels"]), table.select_columns(["place"])
    return Samples(tokens, lengths, learned, of_records, report, key, path, places), report


Row = dict[str, Any]  # input_ids, labels, length, learned, record, place


def encode_all(
    part: Iterable[tuple[str, sources.Record]],
    read: records.Reader,
    encoder: Encoder,
    vocabulary: int,
    config: DataConfig,
    place_of: Callable[[str], str] = str,
) -> tuple[list[Row], Report]:
    """The samples of some records. Raises ``UserError`` for a record that cannot be read.

    Args:
        place_of: the short form of a location.
    """

    def encoded(record: sources.Record) -> tuple[Content, list[Encoded]]:
        content = read(record)
        return content, encoder(content)

    rows, report = [], Report()
    for where, record in part:
        content, samples = records.at(where, encoded, record)
        report.name(UNUSED, read.unused(record))
        report.name(UNREAD, unread(content, encoder.template or ""))
        place = place_of(where)
        if not samples:
            report.add(NOTHING, place)
        if len(samples) > 1:
            report.add(SPLIT, place)
        said = digest(content)
        for ids, learned in samples:
            if ids and max(ids) >= vocabulary:
                raise UserError(
                    f"{where}: token id {max(ids)} is outside the model's {vocabulary} embeddings; "
                    "use the model's own tokenizer, or resize the embeddings"
                )
            kept = _kept(ids, learned, config, report, place)
            if kept is not None:
                rows.append({**kept, "record": said, "place": place})
    return rows, report


def _kept(ids: list[int], learned: list[bool], config: DataConfig, report: Report, place: str) -> Row | None:
    """A row for a sample, unless it is left out."""
    overlong = len(ids) > config.max_length
    if not any(learned[1:]):  # the first token is never predicted
        report.add(NOTHING, place)
        return None
    if overlong and config.overlong == "drop":
        report.add(TOO_LONG, place)
        return None
    ids, learned = ids[: config.max_length], learned[: config.max_length]
    if not any(learned[1:]):
        report.add(CUT_OFF, place)
        return None
    if overlong:
        report.add(TRUNCATED, place)
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels, "length": len(ids), "learned": sum(learned[1:])}


def _write_part(part: Path, rows: Sequence[Row], report: Report) -> None:
    """Write one part. If several ranks write it, the first to finish publishes it: their contents are equal."""
    import datasets

    part.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            "labels": datasets.Sequence(datasets.Value("int32")),
            "length": datasets.Value("int64"),
            "learned": datasets.Value("int64"),
            "record": datasets.Value("int64"),
            "place": datasets.Value("string"),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.disable_progress_bars()
    try:
        with files.new_folder(part) as folder:
            if rows:
                datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
            counts = {"kept": len(rows), "counts": report.counts, "places": report.places, "names": report.names}
            (folder / "counts.json").write_text(json.dumps(counts))
    except OSError:
        if not part.exists():
            raise
