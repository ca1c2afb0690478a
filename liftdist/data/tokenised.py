"""From records to micro-batches.

    records -> tokens + loss mask -> sequences -> global batches -> this rank's micro-batches

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from liftdist.data import sources as records
from liftdist.schema import DataConfig, UserError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # label of a token that does not count towards the loss
PART_RECORDS = 2048  # records tokenised as one unit of work


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
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_reply))
        except TemplateError as error:  # templates refuse roles and orders they do not know
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    whole = render(messages)
    spans = []  # [begin, end) of every reply in the rendered text, with the token that ends the turn
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn > 0:  # an opening by the assistant answers nothing
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
    digest: str  # of the records and of all that made them samples: equal digests, equal samples
    path: str
    places: Dataset  # column: place

    def where(self, sample: int) -> str:
        """File and line of a sample's record, or what takes their place."""
        return f"{self.path}:{self.places[sample]['place']}"

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

    source, digest = records.open_source(path, config.subset, split)
    read = records.reader(source, config.format)
    settings = {k: v for k, v in asdict(config).items() if k in ("format", "max_length", "overlong")}
    key = hashlib.sha256(
        json.dumps([digest, settings, _tokenizer_digest(tokenizer), vocabulary, 2], sort_keys=True).encode()
    ).hexdigest()[:24]
    folder = cache_dir.expanduser() / "tokens" / key
    starts = range(0, len(source), PART_RECORDS)
    parts = [folder / f"part-{number:06d}" for number in range(len(starts))]
    shift = int(first_part * len(parts))
    for done, number in enumerate([*range(shift, len(parts)), *range(shift)]):
        if progress is not None:
            progress(done, len(parts))
        if not parts[number].exists():
            part = source.read(starts[number], starts[number] + PART_RECORDS)
            _write_part(parts[number], _encode_all(part, read, tokenizer, vocabulary, config))
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
        key,
        path,
        table.select_columns(["place"]),
    )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(f"{text}{special}".encode()).hexdigest()


def _encode_all(
    part: Iterator[tuple[str, records.Record]],
    read: Callable[[records.Record], Any],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: DataConfig,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows, counts = [], {"kept": 0, "truncated": 0, "dropped": 0}
    for where, record in part:
        ids, learned = records.at(where, lambda r: encode(read(r), tokenizer), record)
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
        place = where.rpartition(":")[2]  # a line, or " record N"
        rows.append({"input_ids": ids, "labels": labels, "length": len(ids), "place": place})
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
            "place": datasets.Value("string"),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.disable_progress_bars()
    if rows:
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(temporary))
    (temporary / "counts.json").write_text(json.dumps(counts))
    temporary.chmod(0o755)
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

    def steps(self, epochs: int, consumed: int = 0) -> int:
        """Batches left in ``epochs`` epochs after ``consumed`` sequences."""
        return max(0, -(-(self._begin(epochs) - consumed) // self._batch_size))

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
