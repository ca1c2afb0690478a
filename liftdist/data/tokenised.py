"""Tokenised samples in the cache.

    CACHE_DIR/tokens/KEY/part-000000/       an Arrow table of 2048 records, and counts.json

The key is a digest of the data's contents and of everything that determines its tokens. Every rank tokenises missing
parts until all exist, so that no rank waits for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liftdist import files
from liftdist.data import records, sources
from liftdist.errors import UserError
from liftdist.schema import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
from liftdist.data.chat import encode

IGNORED = -100  # label of a token that does not count towards the loss
#: Settings that do not affect tokens; all others are part of the cache key.
NOT_IN_TOKENS = ("path", "revision", "eval_path", "eval_revision", "subset", "split", "eval_split", "packing")
FORMAT = 2  # version of the layout of parts
PART_RECORDS = 2048  # records per part


@dataclass(frozen=True)
class Samples:
    """Tokenised samples, memory-mapped."""

    table: Dataset  # columns: input_ids, labels
    lengths: np.ndarray  # [samples] int64, tokens of each
    truncated: int  # samples cut to max_length
    dropped: int  # samples left out: too long, or without a token to train on
    digest: str  # of the records and all that determines samples: equal digests mean equal samples
    path: str
    places: Dataset  # column: place

    def where(self, sample: int) -> str:
        """Location of a sample's record: file and line, or name and number of the record."""
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
    revision: str | None = None,
) -> Samples:
    """All samples of ``path``, from the cache or tokenised now.

    Args:
        vocabulary: rows of the model's embedding; a token id outside of it is an error.
        revision: commit, tag or branch of a data set on the hub.
        first_part: where among the parts to begin, 0 to 1: ranks that begin apart tokenise different parts.

    Raises:
        UserError: a record that cannot be read (file and line), or no token to train on.
    """
    source = sources.open_source(path, config.subset, split, revision)
    read = records.reader(source, config.format)
    key = _key(source, config, tokenizer, vocabulary, cache_dir)
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
    samples = _load(parts, key, path)
    if samples is None:
        raise UserError(
            f"data {path}: nothing to learn: in all {len(source)} samples no token of a response is left within "
            f"data.max_length={config.max_length} (data.overlong={config.overlong}); raise data.max_length"
        )
    return samples


def _key(
    source: sources.Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int, cache_dir: Path
) -> str:
    """The cache key of the tokens: a digest of everything that determines them."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_TOKENS}
    parts = [source.digest(cache_dir), settings, _tokenizer_digest(tokenizer), vocabulary, FORMAT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _load(parts: Sequence[Path], key: str, path: str) -> Samples | None:
    """The samples of all parts; None if there are none."""
    import datasets

    counts = [json.loads((part / "counts.json").read_text()) for part in parts]
    loaded = [datasets.load_from_disk(str(p)) for p, count in zip(parts, counts, strict=True) if count["kept"]]
    if not loaded:
        return None
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
    part: Iterator[tuple[str, sources.Record]],
    read: Callable[[sources.Record], Any],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    config: DataConfig,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    rows, counts = [], {"kept": 0, "truncated": 0, "dropped": 0}
    for where, record in part:
        ids, learned = records.at(where, lambda r: encode(read(r), tokenizer), record)
        if ids and max(ids) >= vocabulary:
            raise UserError(
                f"{where}: token id {max(ids)} is outside the model's {vocabulary} embeddings; "
                "use the model's own tokenizer, or resize the embeddings"
            )
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
    """Write one part. If several ranks write it, the first to finish publishes it: their contents are equal."""
    import datasets

    rows, counts = encoded
    part.parent.mkdir(parents=True, exist_ok=True)
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
    try:
        with files.new_folder(part) as folder:
            if rows:
                datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
            (folder / "counts.json").write_text(json.dumps(counts))
    except OSError:
        if not part.exists():
            raise
