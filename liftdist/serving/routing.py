"""Which model a request is for: its nearest examples vote.

    x(text) = mean of E[t] over the tokens t of the text        E [vocabulary, d]  the base model's input embedding
    near(text, e) = cos(x(text) - c, x(e) - c)                  c [d]              the mean of x over all examples

The model of most of the 3 nearest examples is chosen; of those with as many votes, the one of the nearest. Which words are used
decides, not their order. No forward of the model is needed: E is a tensor in the base model's folder, of which the rows of these
tokens are read.

By votes of the nearest examples Auto-Switch chooses, too (Qi et al., CVPR 2025, arXiv 2412.00054). Deviations: it embeds by an
encoder of its own, and mixes the tasks that have votes.

Runs where liftdist is installed, then in vLLM's process, on what :meth:`Routes.save` wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from liftdist import safetensors_io
from liftdist.safetensors_io import TensorFile

AUTO = "auto"  # the name of the model that stands for the choice
NEAREST = 3  # examples that vote
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Table:
    """Where a base model has its input embedding ``[vocabulary, d]``."""

    folder: str
    file: str
    tensor: str


class Embedding:
    """Features of texts, by a base model's tokenizer and input embedding, which is mapped from its file."""

    def __init__(self, table: Table) -> None:
        self._table = TensorFile(Path(table.folder) / table.file).mapped(table.tensor)
        self._tokenizer = Tokenizer.from_file(str(Path(table.folder) / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str | Sequence[int]) -> Tensor:
        """``[d]`` float32, of a text or of its tokens. Raises ``ValueError`` if it has none, or one that the model has not."""
        if isinstance(text, str):
            text = text.encode(errors="replace").decode()  # half of a surrogate pair, which JSON may hold, is no text
            ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = text
        if not ids:
            raise ValueError("has no text by which to choose")
        if min(ids) < 0 or max(ids) >= len(self._table):
            raise ValueError(
                f"has token ids that are not below {len(self._table)}, which is how many the base model has"
            )
        tokens, counts = torch.tensor(ids).unique(return_counts=True)
        return counts.float() @ self._table[tokens].float() / counts.sum()


@dataclass(frozen=True)
class Routes:
    """Examples by the model that each is for."""

    table: Table
    names: Sequence[str]  # of models
    labels: Tensor  # [n] int64, numbers of names
    features: Tensor  # [n, d] float32, c subtracted, of length 1
    center: Tensor  # [d] float32, c

    @classmethod
    def of(cls, table: Table, examples: Mapping[str, Sequence[Tensor]]) -> Routes:
        """Those by the features ``[d]`` of examples, by model."""
        features = torch.stack([feature for given in examples.values() for feature in given])
        labels = torch.tensor([number for number, given in enumerate(examples.values()) for _ in given])
        center = features.mean(0)
        return cls(table, list(examples), labels, F.normalize(features - center, dim=1), center)

    def choose(self, feature: Tensor) -> str:
        """The name of the model for a text with this feature ``[d]``."""
        near = self.features @ F.normalize(feature - self.center, dim=0)
        labels = self.labels[near.topk(min(NEAREST, len(near))).indices].tolist()  # the nearest first
        return self.names[max(labels, key=labels.count)]

    def save(self, path: Path) -> None:
        """Raises ``OSError`` if it cannot be written."""
        about = {"table": json.dumps(asdict(self.table)), "names": json.dumps(self.names)}
        tensors = {"labels": self.labels, "features": self.features, "center": self.center}
        safetensors_io.save(tensors, path, about)

    @classmethod
    def load(cls, path: Path) -> Routes:
        """What :meth:`save` wrote."""
        file = TensorFile(path)
        tensors = {name: file.read(name) for name in ("labels", "features", "center")}
        return cls(Table(**json.loads(file.metadata["table"])), json.loads(file.metadata["names"]), **tensors)


def asked(request: Mapping[str, Any]) -> str | list[int]:
    """What a request asks: what the user says in all of its ``messages``, or its ``prompt`` or ``input``, a text or token ids.

    Raises:
        ValueError: it asks several things, or nothing.
    """
    given = next((request[key] for key in ("messages", "prompt", "input") if request.get(key)), None)
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
        given = given[0]
    if isinstance(given, str):
        return given
    if isinstance(given, list) and all(type(one) is int for one in given):
        return given
    if isinstance(given, list) and all(isinstance(one, Mapping) for one in given):
        return said(given)
    raise ValueError("has neither messages nor one prompt")


def said(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user says in messages: the texts, also where they are among other parts."""
    found: list[str] = []
    for message in messages:
        content = message.get("content") if message.get("role") == "user" else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, Mapping))
        found += [text for text in texts if isinstance(text, str)]
    return "\n".join(found)
