"""Tokenised samples in the cache.

    CACHE_DIR/tokens/KEY/part-000000/       the samples of 2048 records
    CACHE_DIR/tokens/KEY/records            how many records there are

The key is a digest of the data's contents and of everything that determines its tokens. Every rank tokenises missing
parts until all exist, its own share first, so that none waits for another; the cores of its machine are divided among the
ranks there (:mod:`liftdist.data.workers`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from liftdist import files
from liftdist.data import parts, reading, records, sources, workers
from liftdist.data.chat import Encoded, Encoder
from liftdist.data.content import Content, Text, digest, unread
from liftdist.data.parts import Row
from liftdist.data.table import Table
from liftdist.data_settings import DataConfig, DataSource
from liftdist.errors import UserError

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
FORMAT = 7  # version of the layout of parts, and of what is refused
_CHUNK = 64  # records whose tokens are Python objects at a time
_FEW = 2  # parts that are made here: other processes take seconds to begin
FIRST_PLACES = 3  # that are named of what was left out

# what becomes of records besides being samples; all but the first two leave them out
TRUNCATED = "truncated to data.max_length"
SPLIT = "split into a sample for each reply"
TOO_LONG = "left out: longer than data.max_length"
CUT_OFF = "left out: nothing to learn within data.max_length"
NOTHING = "left out: nothing to learn in them"
FILES = "files"
ALONE = "tokenised by one process, because the tokenizer cannot be handed to others"
# what records hold that does not reach the tokens
UNKNOWN = "hold text that the tokenizer does not know, and reads as its token for that"
OTHERWISE = "hold a reply after another prompt than the chat template asks with"
UNUSED = "fields that are not used"
UNREAD = "keys that the chat template does not read"
WEIGHTED = "hold weights of tokens"
# settings that nothing uses
IDLE = "settings that are not used, because these records need no chat template"
_OF_TEMPLATES = ("chat_template", "template_arguments")


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

    table: Table  # columns: input_ids, labels, weights
    lengths: np.ndarray  # [samples] int64, tokens of each
    learned: np.ndarray  # [samples] int64, learned tokens of each
    records: np.ndarray  # [samples] int64, digest of what the record says that each is of
    report: Report
    digest: str  # of the records and all that determines samples: equal digests mean equal samples
    path: str
    places: Table  # column: place

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
    shares: Sequence[tuple[int, int]] = (),
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
) -> Samples:
    """All samples of a source, from the cache or tokenised now.

    Args:
        config: for what is the same for all sources.
        vocabulary: rows of the model's embedding; a token id outside of it is an error.
        shares: what to tokenise first, and next, before all that is missing still: ``(i, n)`` is the i-th of n equal shares.
        progress: called at any progress with the records that are tokenised, by whomever, and their number, 0 as long as it is
            not known. What it raises ends the work; parts that are complete stay.
        processes: to tokenise with; if None, this rank's share of the machine's cores.

    Raises:
        UserError: a record that cannot be read (file and line), or no token to train on.
    """
    source, path = sources.open_records(given), given.path
    records.reader(source, given)  # raises
    show = progress or _nothing
    source.watch(lambda _: show(0, 0))
    key = _key(source, given, config, encoder, vocabulary, cache_dir)
    folder = cache_dir.expanduser() / "tokens" / key
    job = _Parts(source, given, config, encoder, vocabulary, folder)
    count = job.count(show)
    numbers = range(-(-count // parts.RECORDS))
    alone: list[str] = []
    try:
        for index, of in [*shares, (0, 1)]:
            made = parts.complete(folder)
            mine = numbers[index * len(numbers) // of : (index + 1) * len(numbers) // of]
            if missing := [number for number in mine if number not in made]:
                alone += _make(job, missing, parts.Shown(folder, count, show), processes or workers.for_each_rank())
    finally:
        job.close()
    samples, report = _load([parts.path(folder, number) for number in numbers], key, path)
    report.name(FILES, source.files)
    report.name(ALONE, alone)
    if samples is None:
        hint = "; raise data.max_length" if report.counts[TOO_LONG] + report.counts[CUT_OFF] else ""
        raise UserError(f"data {path}: nothing to learn: of {count} records {'; '.join(report.lines())}{hint}")
    return samples


def _nothing(done: int, total: int) -> None:
    """Shows no progress."""


def _key(
    source: sources.Source, given: DataSource, config: DataConfig, encoder: Encoder, vocabulary: int, cache_dir: Path
) -> str:
    """The cache key of the tokens: a digest of everything that determines them."""
    settings = asdict(config) | asdict(given)  # of those that both have, the source's hold
    settings = {name: value for name, value in settings.items() if name not in NOT_IN_TOKENS}
    parts = [source.digest(cache_dir), settings, encoder.digest, vocabulary, FORMAT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class _Parts:
    """Makes the parts of one source: a job for :mod:`liftdist.data.workers`."""

    def __init__(
        self,
        source: sources.Source,
        given: DataSource,
        config: DataConfig,
        encoder: Encoder,
        vocabulary: int,
        folder: Path,
    ) -> None:
        self._source, self._given, self._config = source, given, config
        self._encoder, self._digest, self._vocabulary = encoder, encoder.digest, vocabulary
        self._folder, self._unfinished = folder, parts.unfinished(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self._encoder).pop("digest", None)
        if self._encoder.digest != self._digest:
            raise ValueError("its copy is not the same")

    @functools.cached_property
    def _read(self) -> records.Reader:
        return records.reader(self._source, self._given)

    def is_made(self, number: int) -> bool:
        return parts.path(self._folder, number).exists()

    def count(self, show: Callable[[int, int], None]) -> int:
        """The number of records. It takes reading the source once, unless all parts exist."""
        if (known := parts.known_count(self._folder)) is not None:
            return known
        seen = 0

        def beat(rows: int) -> None:
            nonlocal seen
            seen += rows
            show(seen, 0)

        self._source.watch(beat)
        found = len(self._source)
        parts.remember_count(self._folder, found)
        return found

    def make(self, number: int, beat: workers.Beat) -> None:
        self._source.watch(lambda _: beat(0))
        report, begin = Report(), number * parts.RECORDS
        counts = {"counts": report.counts, "places": report.places, "names": report.names}

        def chunks() -> Iterator[list[Row]]:
            for start in range(begin, begin + parts.RECORDS, _CHUNK):
                chunk = _told(self._source.read(start, start + _CHUNK), beat)
                rows, found = encode_all(
                    chunk, self._read, self._encoder, self._vocabulary, self._config, self._source.place
                )
                report.merge(found.counts, found.places, found.names)
                yield rows

        try:
            parts.write(parts.path(self._folder, number), self._unfinished, chunks(), counts)
        except OSError as error:
            raise UserError(
                f"cache_dir: {files.reason(error)}; free some space, or give another folder (cache_dir=...)"
            ) from None

    def close(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        parts.clean(self._folder)


def _told(chunk: Iterable[reading.Place], beat: workers.Beat) -> Iterator[reading.Place]:
    for place in chunk:
        yield place
        beat(1)


def _make(job: _Parts, missing: Sequence[int], shown: parts.Shown, processes: int) -> list[str]:
    """Make parts here or, if it is worth it, by other processes; why those could not, if they could not."""
    shown()
    why = []
    if len(missing) > _FEW and processes > 1:
        try:
            workers.run(job, missing, processes, shown)
            return []
        except workers.Unfit as unfit:
            why = [str(unfit)]
    for number in missing:
        if not job.is_made(number):
            job.make(number, _adding(shown))
    return why


def _adding(shown: parts.Shown) -> workers.Beat:
    made = 0

    def beat(records: int) -> None:
        nonlocal made
        made += records
        shown(made)

    return beat


def _load(folders: Sequence[Path], key: str, path: str) -> tuple[Samples | None, Report]:
    """The samples of all parts, None if there are none, and what became of the other records."""
    report = Report()
    table, found = parts.load(folders)
    for counts in found:
        report.merge(counts["counts"], counts["places"], counts["names"])
    if table is None:
        return None, report
    lengths, learned, of_records = (
        np.concatenate([np.from_dlpack(chunk) for chunk in table.column(name).chunks])  # `to_numpy` imports pandas
        for name in ("length", "learned", "record")
    )
    tokens, places = (
        Table(table.select(names).to_batches()) for names in (["input_ids", "labels", "weights"], ["place"])
    )
    return Samples(tokens, lengths, learned, of_records, report, key, path, places), report


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
        if isinstance(content, Text):
            report.name(IDLE, [f"data.{name}" for name in _OF_TEMPLATES if getattr(config, name)])
        place = place_of(where)
        if any(encoder.unknown in ids for ids, _ in samples):
            report.add(UNKNOWN, place)
        if encoder.asked_otherwise:
            report.add(OTHERWISE, place)
        if content.weights:
            report.add(WEIGHTED, place)
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


def _kept(ids: list[int], learned: list[float], config: DataConfig, report: Report, place: str) -> Row | None:
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
    labels = [token if weight else IGNORED for token, weight in zip(ids, learned, strict=True)]
    weights = learned if any(weight not in (0, 1) for weight in learned) else None
    count = sum(weight != 0 for weight in learned[1:])
    return {"input_ids": ids, "labels": labels, "weights": weights, "length": len(ids), "learned": count}
