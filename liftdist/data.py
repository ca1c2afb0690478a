"""From records to micro-batches.

    records -> (prompt, response) text -> tokens + loss mask -> sequences -> global batches -> this rank's micro-batches

Tokenised samples are Arrow files in the cache, named by content: every rank tokenises parts until all parts exist, so
nobody waits for one. The order is a pure function of (seed, epoch) over sequences, and a batch is dealt to ranks only
after it is composed: every world size sees the same global batches, and the number of sequences consumed is the whole
data state.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liftdist.config import DataConfig, UserError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that does not count towards the loss
PART_RECORDS = 2048  # records tokenised as one unit of work
CHECKED_RECORDS = 1000  # records looked at before anything is started
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")

Record = Mapping[str, Any]
Segment = tuple[str, bool]  # text, and whether it is learned

# ---------------------------------------------------------------------------------------------------------------------
# Formats. A format turns a record into chat messages, or into a prompt and a response.

ALPACA = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
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
    return _chat(record, "messages", "role", "content", None)


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
        raise ValueError(f"{key!r} must be text, got {type(record[key]).__name__}")
    return record[key]


def _chat(record: Record, key: str, role: str, content: str, roles: Mapping[str, str] | None) -> list[dict[str, str]]:
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
        if roles is not None and who not in roles:
            raise ValueError(f"{role!r} must be one of {', '.join(roles)}, got {who!r}")
        messages.append({"role": roles[who] if roles else who, "content": _text(turn, content)})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{key!r} has no turn of the assistant, so nothing to learn")
    return messages


def detect_format(record: Record) -> str:
    """The format whose fields the record has. Raises ``ValueError`` if none fits."""
    for name, (fields, _) in FORMATS.items():
        if all(record.get(field) is not None for field in fields):
            return name
    wanted = "; ".join("/".join(fields) for fields, _ in FORMATS.values())
    raise ValueError(f"fields {', '.join(map(str, record)) or '(none)'} fit no format (known: {wanted})")


# ---------------------------------------------------------------------------------------------------------------------
# Sources. A source knows its number of records and reads any range of them, with a place to name in errors.


class JsonlSource:
    """One JSON object a line; only line offsets are kept. Empty lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: list[tuple[int, int]] = []  # (line number, byte offset)
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.offsets.append((number, offset))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, begin: int, end: int) -> Iterator[tuple[str, Record]]:
        with self.path.open("rb") as file:
            for number, offset in self.offsets[begin:end]:
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
                _at(where, read, record)


def reader(source: Source, format: str) -> Callable[[Record], Any]:
    """Reads a record of ``source``; ``auto`` looks at the first."""
    if format == "auto":
        where, first = next(source.read(0, 1))
        format = _at(where, detect_format, first)
    return FORMATS[format][1]


def _at(where: str, function: Callable[[Record], Any], record: Record) -> Any:
    try:
        return function(record)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tokens.


def encode(content: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of one sample and which of them are learned: the responses and the end of sequence, never the prompt.

    Args:
        content: ``(prompt, response)``, or chat messages.

    Raises:
        ValueError: the tokenizer has no chat template or end of sequence, or the template rewrites earlier turns.
    """
    if isinstance(content, list):
        return _encode_chat(content, tokenizer)
    prompt, response = content
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token")
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        prompt_ids = prompt_ids[:-1]  # some tokenizers close every text
    response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use prompt/completion records with it")

    def render(turns: list[dict[str, str]], open_reply: bool = False) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply))

    whole = render(messages)
    spans = []  # [begin, end) of every reply in the rendered text, with the token that ends the turn
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prefix, upto = render(messages[:turn], True), render(messages[: turn + 1])
            if whole.startswith(upto) and upto.startswith(prefix):
                spans.append((len(prefix), len(upto)))
            elif turn == len(messages) - 1:
                raise ValueError("the chat template does not render the reply after its own generation prompt")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(begin <= a and b <= end and a < b for begin, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], learned


@dataclass(frozen=True)
class Samples:
    """Tokenised samples, memory-mapped."""

    table: Dataset  # columns: input_ids, labels
    lengths: np.ndarray  # [samples] int64, tokens of each
    truncated: int  # samples cut to max_length
    dropped: int  # samples left out: too long, or nothing left to learn

    def __len__(self) -> int:
        return len(self.lengths)


def tokenise(
    path: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    cache_dir: Path,
    split: str = "train",
    first_part: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """All samples of ``path``, from the cache or tokenised now.

    Args:
        vocabulary: rows of the model's embedding; a larger token id is an error.
        first_part: where among the parts to begin, 0 to 1, so that ranks meet late.

    Raises:
        UserError: a record that cannot be read (file and line), or nothing left to learn.
    """
    import datasets

    source, digest = open_source(path, config.subset, split)
    read = reader(source, config.format)
    settings = {k: v for k, v in asdict(config).items() if k in ("format", "max_length", "overlong")}
    key = hashlib.sha256(
        json.dumps([digest, settings, _tokenizer_digest(tokenizer), vocabulary, 1], sort_keys=True).encode()
    ).hexdigest()[:24]
    folder = cache_dir.expanduser() / "tokens" / key
    starts = range(0, len(source), PART_RECORDS)
    parts = [folder / f"part-{number:06d}" for number in range(len(starts))]
    shift = int(first_part * len(parts))
    for done, number in enumerate([*range(shift, len(parts)), *range(shift)]):
        if progress is not None:
            progress(done, len(parts))
        if not parts[number].exists():
            records = source.read(starts[number], starts[number] + PART_RECORDS)
            _write_part(parts[number], _encode_all(records, read, tokenizer, vocabulary, config))
    counts = [json.loads((part / "counts.json").read_text()) for part in parts]
    loaded = [datasets.load_from_disk(str(p)) for p, count in zip(parts, counts, strict=True) if count["kept"]]
    if not loaded:
        raise UserError(
            f"data {path}: nothing to learn: in all {len(source)} samples no token of a response is left within "
            f"data.max_length={config.max_length} (data.overlong={config.overlong})"
        )
    table = datasets.concatenate_datasets(loaded)
    return Samples(
        table.select_columns(["input_ids", "labels"]),
        np.asarray(table.data.column("length").to_numpy(), dtype=np.int64),
        sum(count["truncated"] for count in counts),
        sum(count["dropped"] for count in counts),
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


def _encode_all(
    records: Iterator[tuple[str, Record]],
    read: Callable[[Record], Any],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: DataConfig,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows, counts = [], {"kept": 0, "truncated": 0, "dropped": 0}
    for where, record in records:
        ids, learned = _at(where, lambda r: encode(read(r), tokenizer), record)
        if ids and max(ids) >= vocabulary:
            raise UserError(f"{where}: token id {max(ids)} is outside the model's {vocabulary} embeddings")
        overlong = len(ids) > config.max_length
        ids, learned = ids[: config.max_length], learned[: config.max_length]
        if overlong and config.overlong == "truncate":
            counts["truncated"] += 1
        if (overlong and config.overlong == "drop") or not any(learned[1:]):  # the first token is never predicted
            counts["dropped"] += 1
            continue
        labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
        counts["kept"] += 1
        rows.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return rows, counts


def _write_part(part: Path, encoded: tuple[list[dict[str, Any]], dict[str, int]]) -> None:
    """Write one part; whoever is first wins, and all write the same."""
    import datasets

    rows, counts = encoded
    part.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{part.name}-", dir=part.parent))
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            "labels": datasets.Sequence(datasets.Value("int32")),
            "length": datasets.Value("int64"),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.disable_progress_bars()
    if rows:
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(temporary))
    (temporary / "counts.json").write_text(json.dumps(counts))
    try:
        temporary.rename(part)
    except OSError:
        shutil.rmtree(temporary)
        if not part.exists():
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Order. A sequence is a list of samples: one, or with packing as many as fit.


def epoch_sequences(
    lengths: np.ndarray, seed: int, packing: bool, max_length: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of one epoch: a pure function of its arguments.

    Returns:
        ``order`` [samples] int64, and ``starts`` [sequences + 1]: sequence ``i`` is
        ``order[starts[i]:starts[i + 1]]``.
    """
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(lengths))
    if not packing:
        return order, np.arange(len(order) + 1)
    starts, room = [], 0
    for place, length in enumerate(lengths[order].tolist()):
        if length > room:
            starts.append(place)
            room = max_length
        room -= length
    return order, np.array([*starts, len(order)])


class BatchOrder:
    """The stream of global batches: epochs follow each other without a gap, the last batch may be smaller."""

    def __init__(self, lengths: np.ndarray, seed: int, packing: bool, max_length: int, batch_size: int) -> None:
        self._batch_size = batch_size
        make = functools.partial(epoch_sequences, lengths, seed, packing, max_length)
        self._epoch = functools.lru_cache(maxsize=2)(make)
        self._before = [0]  # sequences before each epoch

    def _begin(self, epoch: int) -> int:
        while len(self._before) <= epoch:
            _, starts = self._epoch(len(self._before) - 1)
            self._before.append(self._before[-1] + len(starts) - 1)
        return self._before[epoch]

    def steps(self, epochs: int) -> int:
        """Batches in ``epochs`` epochs."""
        return -(-self._begin(epochs) // self._batch_size)

    def batch(self, consumed: int, epochs: int | None = None) -> list[list[int]]:
        """The global batch after ``consumed`` sequences, as lists of sample numbers; ends with ``epochs``."""
        batch: list[list[int]] = []
        epoch = 0
        while self._begin(epoch + 1) <= consumed:
            epoch += 1
        while len(batch) < self._batch_size and (epochs is None or epoch < epochs):
            order, starts = self._epoch(epoch)
            first = consumed + len(batch) - self._begin(epoch)
            for begin, end in itertools.pairwise(starts[first : first + self._batch_size - len(batch) + 1].tolist()):
                batch.append(order[begin:end].tolist())
            epoch += 1
        return batch


def deal(
    batch: Sequence[list[int]], lengths: np.ndarray, rank: int, ranks: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """This rank's micro-batches of a global batch: as many on every rank, empty ones where sequences run short.

    Sequences go round by length, so that ranks have like work and a micro-batch little padding.
    """
    ordered = sorted(batch, key=lambda sequence: -int(sum(lengths[sample] for sample in sequence)))
    mine = ordered[rank::ranks]
    rounds = -(-len(ordered) // (ranks * micro_batch_size))
    return [mine[turn * micro_batch_size : (turn + 1) * micro_batch_size] for turn in range(rounds)]


def collate(samples: Samples, sequences: Sequence[list[int]], pad_token: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of one micro-batch, padded on the right: causal attention never looks there.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``, each ``[sequences, longest]`` int64. Positions start again with every
        packed sample, which is how transformers keeps samples apart. Labels are shifted: ``labels[t]`` is the token
        to predict at ``t``. No sequence at all gives one padding token without a label.
    """
    import torch

    rows = [samples.table[sequence] for sequence in sequences]
    longest = max((sum(map(len, row["input_ids"])) for row in rows), default=1)
    shape = (max(len(rows), 1), longest)
    input_ids = torch.full(shape, pad_token)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.arange(longest).repeat(shape[0], 1)
    for index, row in enumerate(rows):
        begin = 0
        for ids, targets in zip(row["input_ids"], row["labels"], strict=True):
            end = begin + len(ids)
            input_ids[index, begin:end] = torch.tensor(ids)
            labels[index, begin : end - 1] = torch.tensor(targets[1:])
            position_ids[index, begin:end] = torch.arange(len(ids))
            begin = end
        position_ids[index, begin:] = torch.arange(longest - begin) + (
            len(row["input_ids"][-1]) if row["input_ids"] else 0
        )
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
