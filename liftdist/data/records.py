"""Parsing of records: fields and their names, the user's own wording, and detection of the format.

record -> format (liftdist/data/formats) or templates (liftdist/data/wording.py) -> content (liftdist/data/content.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from liftdist.data import content, weights, wording
from liftdist.data.content import Content, Conversation, Text
from liftdist.data.sources import Record, Source, check_splits, is_local, open_records
from liftdist.data_settings import DataConfig, DataSource
from liftdist.errors import UserError
from liftdist.registry import FORMATS

CHECKED_RECORDS = 1000  # records checked before ranks start
_RENDERED = "text"  # the format of what many data sets hold besides: a record's parts in one text
_MARK = "label"  # false of a reply that is not to be learned, in data sets of single replies with a verdict on each


def text(record: Record, key: str) -> str:
    """The text in field ``key``. Raises ``ValueError`` if it is absent or not text."""
    if key not in record:
        raise ValueError(f"field {key!r} is missing (fields: {_listed(record)})")
    if not isinstance(record[key], str):
        kind = "null" if record[key] is None else type(record[key]).__name__
        raise ValueError(f"{key!r} must be text, got {kind}")
    return record[key]


def optional_text(record: Record, key: str) -> str:
    """The text in field ``key``, empty if there is none. Raises ``ValueError`` if it is not text."""
    return "" if record.get(key) is None else text(record, key)


def pairs(record: Record, key: str) -> list[tuple[str, str]]:
    """The pairs of texts in field ``key``: what was asked, and the reply. Raises ``ValueError`` for anything else."""
    given = [] if content.is_empty(record.get(key)) else record[key]
    if not isinstance(given, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in given
    ):
        raise ValueError(f"{key!r} must be a list of pairs of texts, what was asked and the reply")
    return [(asked, reply) for asked, reply in given]


def exchange(record: Record, asked: str, reply: str, *further: str) -> Conversation:
    """A conversation of fields: ``history``, then field ``asked``, then ``reply``, which alone is learned.

    Args:
        further: optional fields that follow in the turn of ``asked``, each after an empty line.

    Raises:
        ValueError: a field is missing or not text.
    """
    turns = [
        {"role": role, "content": said}
        for pair in pairs(record, "history")
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    parts = [text(record, asked), *(optional_text(record, name) for name in further)]
    last = [
        {"role": "user", "content": "\n\n".join(filter(None, parts))},
        {"role": "assistant", "content": text(record, reply)},
    ]
    return content.conversation(record, turns + last, f"{asked} + {reply}", len(turns))


@dataclass(frozen=True)
class Reader:
    """Reads the records of one source. Raises ``ValueError`` for a record that does not fit."""

    read: Callable[[Record], Content]
    format: str  # its name; empty for the user's own wording
    used: frozenset[str]  # fields
    is_table: bool  # whether it has null for what a record does not have

    def __call__(self, record: Record) -> Content:
        if self.is_table:
            record = {name: _without_nulls(value) for name, value in record.items()}
        return self.read(record)

    def unused(self, record: Record) -> list[str]:
        """The fields that do not reach the tokens."""
        return [name for name, value in record.items() if name not in self.used and value is not None]


def reader(source: Source, config: DataSource) -> Reader:
    """What reads the records of ``source``; the format ``auto`` is detected from the first.

    Raises:
        UserError: no format fits, or several, or ``data.fields`` or a template does not fit.
    """
    where, first = next(iter(source.read(0, 1)))
    own, section = config.fields, config.section
    if config.prompt_template is None:
        format = _format(where, first, config)
        read, used = format.read, {own.get(name, name) for name in _fields(format)}
        name = format.__name__.rpartition(".")[2]

        def by_format(record: Record) -> Content:
            content.refuse_media(record, "the record")
            if name != _RENDERED and _MARK not in used:
                _refuse_marked(record, section)
            return read(_renamed(record, own, section))

        weighing, fields = _weighing(config, by_format, format.RESPONSE and own.get(format.RESPONSE, format.RESPONSE))
        return Reader(weighing, name, frozenset(used) | fields, source.is_table)
    prompt = wording.Template.parse(f"{section}.prompt_template", config.prompt_template)
    if config.response_template is not None:
        response = wording.Template.parse(f"{section}.response_template", config.response_template)
        if not response.fields:
            raise UserError(
                f"{section}.response_template: has no {{field}} of a record, so every record would teach the same text"
            )
    else:
        format = _format(where, first, config)
        if format.RESPONSE is None:
            raise UserError(
                f"{section}.prompt_template: {where} has no field that is the response; give {section}.response_template"
            )
        if config.format != "auto" and (others := sorted(own.keys() - {format.RESPONSE})):
            raise UserError(
                f"{section}.fields.{others[0]}: is not used with {section}.prompt_template, which names the records' own fields; "
                f"leave it out"
            )
        response = wording.Template.of_field(f"{section}.prompt_template", own.get(format.RESPONSE, format.RESPONSE))

    def worded(record: Record) -> Text:
        if config.response_template is None and _MARK not in prompt.fields | response.fields:
            _refuse_marked(record, section)
        return Text([(prompt.fill(record), False), (response.fill(record), True)])

    weighing, fields = _weighing(config, worded, response.only_field)
    return Reader(weighing, "", prompt.fields | response.fields | fields, source.is_table)


def _refuse_marked(record: Record, section: str) -> None:
    """Raises ``ValueError`` for a reply that the record says is a bad one."""
    if record.get(_MARK) is False:
        raise ValueError(
            f"{_MARK} is false, which marks a reply that is not to be learned: leave such records out; where the field means "
            f"something else, rename it, or give {section}.prompt_template and {section}.response_template"
        )


def _weighing(
    config: DataSource, read: Callable[[Record], Content], response: str | None
) -> tuple[Callable[[Record], Content], frozenset[str]]:
    """A reader that also reads the weights of tokens, if the source has any, and the fields that it reads for that.

    Args:
        response: the field that is the response, as it is; None if no one field is.
    """
    field = config.token_weights
    if field is None:
        return read, frozenset()
    if response is None:
        raise UserError(
            f"{config.section}.token_weights={field}: weights are of a response that is one field of the record, as it is; these "
            "records have none"
        )

    def weighing(record: Record) -> Content:
        if field not in record:
            raise ValueError(f"field {field!r} ({config.section}.token_weights) is missing (fields: {_listed(record)})")
        return weights.weighted(read(record), record[response], record[field], field)

    return weighing, frozenset([field])


def _format(where: str, first: Record, config: DataSource) -> ModuleType:
    """The module of the format. Raises ``UserError`` if none fits, or has not the fields that are renamed."""
    name, own, section = config.format, config.fields, config.section
    if name == "auto":
        _check_names(section, own, [field for known in FORMATS for field in _fields(FORMATS.load(known))], "formats")
        name = at(where, lambda record: detect_format(_renamed(record, own, section), section), first)
    module = FORMATS.load(name)
    _check_names(section, own, _fields(module), f"format {name}")
    return module


def _fields(format: ModuleType) -> list[str]:
    return [*format.FIELDS, *format.OPTIONAL]


def _check_names(section: str, given: Iterable[str], known: Iterable[str], whose: str) -> None:
    names = list(dict.fromkeys(known))
    for name in given:
        if name not in names:
            raise UserError(f"{section}.fields.{name}: is no field of {whose}; the fields: {_listed(names)}")


def _renamed(record: Record, own: Mapping[str, str], section: str) -> Record:
    """The record with the format's names for fields that have other names. Raises ``ValueError`` if one is missing."""
    for name, given in own.items():
        if given not in record:
            raise ValueError(f"field {given!r} ({section}.fields.{name}) is missing (fields: {_listed(record)})")
    taken = {*own, *own.values()}
    return {name: value for name, value in record.items() if name not in taken} | {
        name: record[given] for name, given in own.items()
    }


def _without_nulls(value: Any) -> Any:
    """The value without keys that hold null: a table has the same keys in all records."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def detect_format(record: Record, section: str = "data") -> str:
    """The format whose fields the record has. Raises ``ValueError`` if there is none, or more than one.

    Args:
        section: with the settings that could say more.
    """
    known: dict[frozenset[str], str] = {}
    for name in FORMATS:
        known.setdefault(frozenset(FORMATS.load(name).FIELDS), name)
    present = {field for field, value in record.items() if value is not None}  # tables have a null for an absent field
    for names in (present, set(record)):
        fits = [name for fields, name in known.items() if fields <= names]
        if len(fits) > 1:
            fits = [name for name in fits if name != _RENDERED]
        if len(fits) > 1:
            raise ValueError(
                f"fields {_listed(record)} fit several formats; set {section}.format to one of {', '.join(fits)}"
            )
        if fits:
            return fits[0]
    if {"chosen", "rejected"} <= record.keys():
        asked = {"prompt": "response", "instruction": "response", "question": "answer"}
        field = next((reply for name, reply in asked.items() if name in record), "text")
        field = "messages" if isinstance(record["chosen"], list) else field
        raise ValueError(
            f"fields {_listed(record)} are preferences, of which nothing is learned by itself; "
            f"data.fields.{field}=chosen learns the chosen ones"
        )
    expected = "; ".join("/".join(FORMATS.load(name).FIELDS) for name in known.values())
    raise ValueError(
        f"fields {_listed(record)} fit no format (known: {expected}); say with {section}.fields which are which, "
        f"or give {section}.prompt_template and {section}.response_template"
    )


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def at(where: str, function: Callable[[Record], Any], record: Record) -> Any:
    """``function(record)``, with ``ValueError`` raised as a ``UserError`` that begins with the location ``where``."""
    try:
        return function(record)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_first_records(config: DataConfig) -> None:
    """Read the first records of local files as training does. Fast, without torch; hub data sets are skipped.

    Raises:
        UserError: naming file and line.
    """
    check_splits(config)
    for given in config.all_sources:
        if is_local(given.path):
            source = open_records(given)
            read = reader(source, given)
            for where, record in source.read(0, CHECKED_RECORDS):
                at(where, read, record)
