"""``liftdist data``: what a run would learn, without ranks and weights.

Reads and checks what a run does, by the same code and with the same cache, except its directory, which it does not make.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from liftdist import config as configs
from liftdist import files, preflight
from liftdist.console import Console
from liftdist.data import pieces, records, sources, tokenised
from liftdist.data.hub_sources import DatasetSource
from liftdist.data.reading import Source
from liftdist.data.tables import TableSource
from liftdist.data.tokenised import IGNORED, Report, Row, Samples
from liftdist.data_settings import DataSource
from liftdist.errors import UserError
from liftdist.runs import claims
from liftdist.schema import Config
from liftdist.training import figures, inputs, marked
from liftdist.training.inputs import Encoding
from liftdist.training.marked import Shown

SAMPLES = 3  # of each source that are shown if nothing else is asked for
_BATCH = 256  # samples that are in memory at a time
_LEFT_OUT = "left out"


class _Bars(Console):
    """Progress alone: what a run says of its data is in the figures."""

    def say(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """The samples of one source to train on, or of one that is held out."""

    given: DataSource
    source: Source
    samples: Samples
    held_out: bool

    @property
    def title(self) -> str:
        return f"{'held-out' if self.held_out else 'training'} data: {self.given.path}"


@dataclass(frozen=True)
class Sample:
    """One sample, or a record that has none."""

    part: Part
    place: str
    ids: list[int]
    labels: list[int]  # the first is never learned: no token predicts it
    note: str = ""
    weights: list[float] | None = None  # of the labels, if not all are 1

    @classmethod
    def of(cls, part: Part, row: Row, note: str = "") -> Sample:
        labels = [IGNORED, *row["labels"][1:]]
        return cls(part, part.source.where(row["place"]), row["input_ids"], labels, note, row["weights"])

    @property
    def learned(self) -> list[bool]:
        return [label != IGNORED for label in self.labels]

    @property
    def title(self) -> str:
        return f"{self.place} (held out)" if self.part.held_out else self.place

    def as_json(self, decode: pieces.Decode) -> str:
        cut = pieces.runs(decode, self.ids, self.learned) if self.ids else []
        return json.dumps(
            {
                "place": self.place,
                "source": self.part.given.name,
                "held_out": self.part.held_out,
                "input_ids": self.ids,
                "labels": self.labels,
                **({"weights": self.weights} if self.weights else {}),
                "text": "".join(piece.text for piece in cut),
                "learned": [piece.text for piece in cut if piece.learned],
                **({"note": self.note} if self.note else {}),
            }
        )


def lines(options: argparse.Namespace) -> Iterator[str]:
    """What to print, one line at a time; the page is written before.

    Raises:
        UserError: for what a run would refuse, and for a place that holds no record.
    """
    if options.samples is not None and options.samples < 0:
        raise UserError(f"--samples {options.samples}: must be at least 0")
    if options.html:
        files.check_page(options.html, marked.PAGE, "`liftdist data`", "--html")
    config, _ = configs.load(options.config, options.overrides)
    preflight.check(config, None, training=False)
    records.check_first_records(config.data)
    encoding = inputs.encoding_of(config, weights=False)
    found = inputs.prepare_inputs(config, Console(True) if options.json else _Bars(True), encoding=encoding)
    parts = _parts(config, found)
    decode = pieces.decoder(encoding.encoder_of(parts[0].given).tokenizer)
    everything = options.json and options.samples is None and not options.record
    count = options.samples if options.samples is not None else 0 if options.record else SAMPLES
    chosen = _records(config, encoding, parts, options.record)
    if not everything or options.html:
        chosen += [sample for part in parts for sample in _spread(part, count)]
    shown = [Shown(sample.title, sample.ids, sample.learned, sample.note) for sample in chosen]
    if options.html or not (options.json or options.record):
        about = _figures(config, encoding, parts, found.samples.lines())
    if options.html:
        page = marked.page(f"liftdist data {options.config}", about, shown, decode)
        files.write_page(options.html, page, "--html")
    if options.json:
        yield from (sample.as_json(decode) for sample in (_all(parts) if everything else chosen))
    elif options.html:
        yield str(options.html)
    else:
        yield from _text([] if options.record else about, shown, decode)


def _parts(config: Config, found: inputs.Inputs) -> list[Part]:
    training, data = config.data.training_sources, config.data
    held_out = training if data.eval_share is not None else data.held_out_sources
    opened = {given.key: sources.open_records(given) for given in data.all_sources}
    return [
        Part(given, opened[given.key], samples, False)
        for given, samples in zip(training, found.samples.parts, strict=True)
    ] + [Part(given, opened[given.key], found.held_out[given.name], True) for given in held_out]


# ---------------------------------------------------------------------------------------------------------------------
# Which samples.


def _all(parts: Sequence[Part]) -> Iterator[Sample]:
    for part in parts:
        tokens, places = part.samples.table.iter(_BATCH), part.samples.places.iter(_BATCH)
        for batch, at in zip(tokens, places, strict=True):
            columns = {**batch, "place": at["place"]}
            for row in zip(*columns.values(), strict=True):
                yield Sample.of(part, dict(zip(columns, row, strict=True)))


def _spread(part: Part, count: int) -> Iterator[Sample]:
    """So many samples, from the first to the last."""
    size = len(part.samples)
    count = min(count, size)
    for number in range(count):
        at = number * (size - 1) // max(count - 1, 1)
        yield Sample.of(part, {**part.samples.table[at], **part.samples.places[at]})


def _records(config: Config, encoding: Encoding, parts: Sequence[Part], wanted: Sequence[str]) -> list[Sample]:
    """The samples of the records at some places. Raises ``UserError`` for one that is at none, or at several."""
    found: list[Sample] = []
    by_source = {
        part.given.key: part for part in reversed(parts)
    }  # of one that is held out in part, what is trained on
    for place in wanted:
        hits = [
            (part, where, record)
            for part in by_source.values()
            for where, record in _at(part.source, part.given.path, place)
        ]
        names = list(dict.fromkeys(where for _, where, _ in hits))
        if not names:
            paths = ", ".join(part.given.path for part in by_source.values())
            raise UserError(f"--record {place}: no such record in {paths}; a place is as messages print it: FILE:LINE")
        if len(names) > 1:
            raise UserError(f"--record {place}: is {' and '.join(names)}; give one of them")
        for part, where, record in hits:
            found += _encoded(config, encoding, parts, part, where, record)
    return found


def _at(source: Source, path: str, wanted: str) -> Iterator[tuple[str, sources.Record]]:
    """The records whose location a user may mean by ``wanted``."""
    number = re.search(r"(\d+)$", wanted)
    if number is None:
        return
    last = int(number[1])  # in a table the position of the record, else not below it
    asked = _plain(wanted)
    for one in getattr(source, "sources", [source]):
        for where, record in one.read(last if isinstance(one, TableSource | DatasetSource) else 0, last + 1):
            names = (where, source.place(where), f"{path}:{source.place(where)}")
            numbers = (re.sub(r"^record ", "", name) for name in names)
            if any(_plain(name) == asked or _plain(name).endswith(f"/{asked}") for name in (*names, *numbers)):
                yield where, record


def _plain(place: str) -> str:
    return re.sub(r":\s+", ":", place.strip())


def _encoded(
    config: Config,
    encoding: Encoding,
    parts: Sequence[Part],
    part: Part,
    where: str,
    record: sources.Record,
) -> Iterator[Sample]:
    """The samples of a record; one without tokens that says why, if it is left out."""
    read = records.reader(part.source, part.given)
    encoder, vocabulary = encoding.encoder_of(part.given), encoding.text_config.vocab_size
    rows, report = tokenised.encode_all([(where, record)], read, encoder, vocabulary, config.data, part.source.place)
    for row in rows:
        mine = [
            other for other in parts if other.given.key == part.given.key and row["record"] in other.samples.records
        ]
        yield Sample.of(mine[0] if mine else part, row, _note(report))
    if not rows:
        yield Sample(part, where, [], [], _note(report))


def _note(report: Report) -> str:
    return "; ".join(report.counts)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed.


def _figures(config: Config, encoding: Encoding, parts: Sequence[Part], shares: Sequence[str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        read = records.reader(part.source, part.given)
        where, record = next(iter(part.source.read(0, 1)))
        template = _template(config, encoding, part.given)
        first = records.at(where, read, record)
        found += [
            *figures.of_source(part.title, config.data, part.given, read.format, first, part.samples, template),
            "",
        ]
    for line in shares:
        found += figures.wrapped(line, "")
    return found if shares else found[:-1]


def _template(config: Config, encoding: Encoding, given: DataSource) -> str:
    """Which chat template is used, and the date that it writes."""
    data, encoder = config.data, encoding.encoder_of(given)
    own = f"that of the tokenizer in {config.model.path}"
    is_file = data.chat_template is not None and data.chat_template.endswith((".jinja", ".jinja2"))
    origin = own if data.chat_template is None else data.chat_template if is_file else "data.chat_template"
    if not encoder.writes_date:
        return origin
    run_dir = Path(config.run_dir).expanduser()
    date = f"{inputs.date_of(run_dir):%Y-%m-%d}"
    begun = "when the run began" if claims.attempts(run_dir) else "today; a run writes the day on which it begins"
    return f"{origin}; it writes the date: {date}, {begun}"


def _text(about: Sequence[str], samples: Sequence[Shown], decode: pieces.Decode) -> Iterator[str]:
    in_colour = marked.has_colours()
    yield from map(marked.visible, about)
    if about and samples:
        yield f"\nSamples; what is learned is in {'green' if in_colour else marked.OPEN + marked.CLOSE}:"
    for number, sample in enumerate(samples):
        if about or number:
            yield ""
        yield from marked.lines(sample, decode, in_colour)
