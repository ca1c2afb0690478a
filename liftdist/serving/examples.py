"""Examples of what models are asked, read from files of records for :mod:`liftdist.serving.routing`.

--examples NAME=FILE    records as training takes them; what stands before the last reply is the example
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from liftdist.console import Console
from liftdist.data import records, sources
from liftdist.data.content import Text, parted
from liftdist.data.records import Reader
from liftdist.data.sources import Record, Source
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import build, names
from liftdist.models.weights import ModelFolder
from liftdist.registry import FORMATS
from liftdist.serving.routing import AUTO, TOKENIZER, Embedding, Routes, Table, said

MOST = 100  # of a model: as many of each, so that none outvotes the others by its number


def routes(folder: Path, given: Mapping[str, str]) -> Routes:
    """The routes by examples of two models or more.

    Args:
        folder: of the base model.
        given: files of records by model.

    Raises:
        UserError: there are examples of one model alone; a file holds no records of training data, or one that asks nothing; or
            the base model has no tokenizer or input embedding that can be read.
    """
    if len(given) < 2:
        raise UserError(f"--examples {''.join(given)}: {AUTO} has one model to choose from; give examples of another")
    table = table_of(folder)
    try:
        embedding = Embedding(table)
    except Exception as error:  # the library raises no other
        reason = " ".join(str(error).split())
        raise UserError(
            f"--examples: {folder / TOKENIZER}: cannot be read: {reason}; save the tokenizer again"
        ) from None
    features = {}
    for name, path in given.items():
        source = sources.open_source(path, None, "train")
        total, feature = len(source), partial(_feature, embedding, _reader(source))
        count = min(total, MOST)
        taken = (number * total // count for number in range(count))  # from all of the file
        places = [place for number in taken for place in source.read(number, number + 1)]
        features[name] = [records.at(where, feature, record) for where, record in places]
        Console(enabled=True).say(f"examples {name}: {count} of {total} records of {path}")
    return Routes.of(table, features)


def table_of(folder: Path) -> Table:
    """Where a model folder has its input embedding. Raises ``UserError`` if it has none as one tensor, or no tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        raise UserError(
            f"--examples: {folder} holds no {TOKENIZER}, by which examples are read; save its tokenizer as a fast one"
        )
    config, files = ModelConfig(path=str(folder)), ModelFolder(folder)
    model = build.build(build.check_type(folder, config), config)
    stored, weight = names.match(model, files).stored, model.get_input_embeddings().weight
    found = [stored[name] for name, tensor in build.tensors(model).items() if tensor is weight and name in stored]
    if not found:
        raise UserError(f"--examples: {folder} stores no input embedding as one tensor, by which examples are compared")
    if found[0] in files.quantised:
        raise UserError(f"--examples: {folder} stores its input embedding quantised; give the unquantised model")
    return Table(str(folder.absolute()), files.file_of[found[0]], found[0])


def _reader(source: Source) -> Reader:
    where, first = next(iter(source.read(0, 1)))
    try:
        name = records.detect_format(first)
    except ValueError:
        raise UserError(
            f"{where}: fields {', '.join(first) or 'none'} are those of no format of training data, or of several; name them as "
            "one format does: messages, or prompt and completion"
        ) from None
    return Reader(FORMATS.load(name).read, name, frozenset(), source.is_table)


def _feature(embedding: Embedding, read: Reader, record: Record) -> Tensor:
    """``[d]`` of what a record asks, as of a request that asks the same. Raises ``ValueError`` if it asks nothing."""
    prompt, _ = parted(read(record))
    text = "".join(text for text, _ in prompt.pieces) if isinstance(prompt, Text) else said(prompt.messages)
    return embedding(text)
