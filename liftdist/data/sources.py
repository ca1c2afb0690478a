"""Records: where they come from and what they say.

    source (file or hub) -> record -> chat messages, or (prompt, response)

Every error names its file and line. Imports no torch: the first records are checked before anything is started.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from liftdist.schema import DataConfig, UserError

CHECKED_RECORDS = 1000  # records looked at before anything is started
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

Record = Mapping[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# Formats. A format turns a record into chat messages, or into a prompt and a response.

ALPACA = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
CHAT_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _alpaca(record: Record) -> tuple[str, str]:
    instruction, given = _text(record, "instruction"), record.get("input") or ""
    if not isinstance(given, str):
        raise ValueError(f"'input' must be text, got {type(given).__name__}")
    prompt = ALPACA.format(
        instruction=instruction,
        with_input=", paired with an input that provides further context" if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return prompt, _text(record, "output")


def _prompt_completion(record: Record) -> tuple[str, str]:
    return _text(record, "prompt"), _text(record, "completion")


def _messages(record: Record) -> list[dict[str, str]]:
    return _chat(record, "messages", "role", "content", CHAT_ROLES)


def _sharegpt(record: Record) -> list[dict[str, str]]:
    return _chat(record, "conversations", "from", "value", SHAREGPT_ROLES)


#: format -> (fields by which it is told, reader)
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record], Any]]] = {
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
}


def _text(record: Record, key: str) -> str:
    if key not in record:
        raise ValueError(f"field {key!r} is missing (fields: {', '.join(map(str, record)) or 'none'})")
    if not isinstance(record[key], str):
        kind = "null" if record[key] is None else type(record[key]).__name__
        raise ValueError(f"{key!r} must be text, got {kind}")
    return record[key]


def _chat(record: Record, key: str, role: str, content: str, roles: Mapping[str, str]) -> list[dict[str, str]]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f"{key!r} must be a list of turns, got {type(turns).__name__ if turns is None or turns else 'an empty list'}"
        )
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn of {key!r} must be an object, got {type(turn).__name__}")
        who = _text(turn, role)
        if who not in roles:
            raise ValueError(f"{role!r} must be one of {', '.join(roles)}, got {who!r}")
        messages.append({"role": roles[who], "content": _text(turn, content)})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{key!r} has no turn of the assistant, so nothing to learn")
    return messages


def detect_format(record: Record) -> str:
    """The format whose fields the record has. Raises ``ValueError`` if none fits."""
    present = {field for field, value in record.items() if value is not None}  # tables have a null for an absent field
    for names in (present, set(record)):
        for name, (fields, _) in FORMATS.items():
            if names.issuperset(fields):
                return name
    wanted = "; ".join("/".join(fields) for fields, _ in FORMATS.values())
    raise ValueError(f"fields {', '.join(map(str, record)) or '(none)'} fit no format (known: {wanted})")


# ---------------------------------------------------------------------------------------------------------------------
# Sources. A source knows its number of records and reads any range of them, with a place to name in errors.


class JsonlSource:
    """One JSON object a line; only line offsets are kept. Empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers, self._offsets = array("q"), array("q")  # of each record: its line, and where that begins
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._numbers.append(number)
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        with self.path.open("rb") as file:
            for number, offset in zip(self._numbers[begin:end], self._offsets[begin:end], strict=True):
                file.seek(offset)
                where = f"{self.path}:{number}"
                try:
                    record = json.loads(file.readline())
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    reason = getattr(error, "msg", None) or str(error)
                    column = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                    raise UserError(f"{where}: not JSON: {reason}{column}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{where}: must be a JSON object, got {type(record).__name__}")
                yield where, record


class ListSource:
    """Records in memory or memory-mapped: a JSON array, or a data set of the ``datasets`` library."""

    def __init__(self, name: str, records: Any) -> None:
        self.name, self.records = name, records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        for index in range(begin, min(end, len(self.records))):
            record = self.records[index]
            if not isinstance(record, dict):
                raise UserError(f"{self.name}: record {index}: must be an object, got {type(record).__name__}")
            yield f"{self.name}: record {index}", record


Source = JsonlSource | ListSource


def is_local(path: str) -> bool:
    return Path(path).suffix in LOCAL_SUFFIXES or path.startswith((".", "/", "~")) or Path(path).exists()


def open_source(path: str, subset: str | None, split: str) -> tuple[Source, str]:
    """The source of a path or hub name, and a digest of its content.

    Raises:
        UserError: it is missing, unreadable, empty or of an unknown kind.
    """
    if not is_local(path):
        return _open_hub(path, subset, split)
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data {path}: " + ("is a folder, name a file" if file.is_dir() else "no such file"))
    if file.suffix not in LOCAL_SUFFIXES:
        raise UserError(f"data {path}: must end in {', '.join(LOCAL_SUFFIXES)}")
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        source: Source
        if file.suffix == ".jsonl":
            source = JsonlSource(file)
        elif file.suffix == ".parquet":
            source = ListSource(path, _load_dataset("parquet", data_files=str(file), split="train"))
        else:
            source = _open_json(file)
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}") from None
    if not len(source):
        raise UserError(f"data {path}: holds no record")
    return source, digest


def _open_json(file: Path) -> Source:
    """A JSON array of objects; a file of one object a line is common under this name too."""
    with file.open("rb") as stream:
        if stream.read(4096).lstrip()[:1] != b"[":
            return JsonlSource(file)
    try:
        return ListSource(str(file), json.loads(file.read_bytes()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}{line}: not JSON: {getattr(error, 'msg', error)}") from None


def _open_hub(path: str, subset: str | None, split: str) -> tuple[Source, str]:
    records = _load_dataset(path, subset, split=split)
    if not len(records):
        raise UserError(f"data {path}: split {split} holds no record")
    return ListSource(f"{path}[{split}]", records), records._fingerprint


def _load_dataset(*args: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:  # the library raises almost anything
        name = options.get("data_files", args[0])
        raise UserError(f"data {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def check_first_records(config: DataConfig) -> None:
    """Read the first records of local files as training would. Quick, without torch; hub data is not touched.

    Raises:
        UserError: naming file and line.
    """
    for path in filter(None, (config.path, config.eval_path)):
        if is_local(path):
            source, _ = open_source(path, None, "train")
            read = reader(source, config.format)
            for where, record in source.read(0, CHECKED_RECORDS):
                at(where, read, record)


def reader(source: Source, format: str) -> Callable[[Record], Any]:
    """Reads a record of ``source``; ``auto`` looks at the first."""
    if format == "auto":
        where, first = next(source.read(0, 1))
        format = at(where, detect_format, first)
    return FORMATS[format][1]


def at(where: str, function: Callable[[Record], Any], record: Record) -> Any:
    try:
        return function(record)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
