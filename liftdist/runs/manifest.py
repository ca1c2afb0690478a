"""What a checkpoint says of itself, in ``manifest.json``: its state, where that comes from, and what its files must be.

The file holds a hash of everything else in it. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftdist.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """Where a state comes from: what a run that continues is compared with."""

    config: str  # as liftdist.config.load gives its text
    from_environment: dict[str, str]  # for each setting that the environment gives, a short hash of its value
    base: str  # digest of the base model
    data: str  # digest of the training samples


@dataclass(frozen=True)
class Snapshot:
    """What is saved at one step besides tensors."""

    step: int
    state: dict[str, Any]  # alike on all ranks, plain numbers
    provenance: Provenance
    names: Mapping[str, str] = field(default_factory=dict)  # of each parameter, its name in the base model's files


@dataclass(frozen=True)
class ShardFile:
    shard: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parameter:
    """A trained matrix."""

    shape: list[int]
    dtype: str
    principal: int  # weights that are trained
    dropped: int  # that were before
    keys: dict[str, str]  # of its tensors in each file, with their dtypes


@dataclass(frozen=True)
class Manifest:
    snapshot: Snapshot
    attempt: int
    nonce: str  # of the attempt's claim
    files: dict[str, ShardFile]
    row_bounds: dict[int, list[int]]  # for a matrix of so many rows, where each shard's begin
    parameters: dict[str, Parameter]
    sha256: str = ""  # of the rest; of a manifest that was read

    @property
    def step(self) -> int:
        return self.snapshot.step

    @property
    def provenance(self) -> Provenance:
        return self.snapshot.provenance

    def write(self, path: Path) -> Manifest:
        """Write the file, which must not exist, and return the manifest with its hash. Whoever publishes the folder syncs it."""
        tree = dataclasses.asdict(self)
        snapshot = tree.pop("snapshot")
        tree |= snapshot.pop("provenance") | snapshot | {"format": FORMAT}
        del tree["sha256"]
        tree = json.loads(json.dumps(tree))  # as it will be read: numbers become texts where they are keys
        sha256 = _digest(tree)
        with path.open("x", encoding="utf-8") as file:
            json.dump(tree | {"sha256": sha256}, file, sort_keys=True, indent=1)
        return dataclasses.replace(self, sha256=sha256)


def read(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ValueError, OSError: it is absent or damaged.
        UserError: another version of liftdist wrote it.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        sha256 = tree.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if sha256 != _digest(tree):
        raise ValueError(f"{path} is damaged: its contents do not have its hash")
    if tree["format"] != FORMAT:
        raise UserError(f"{path} has format {tree['format']}, this version reads {FORMAT}")
    provenance = Provenance(*(tree[f.name] for f in dataclasses.fields(Provenance)))
    return Manifest(
        Snapshot(tree["step"], tree["state"], provenance, tree.get("names", {})),  # names: since 0.2
        tree["attempt"],
        tree["nonce"],
        {name: ShardFile(**entry) for name, entry in tree["files"].items()},
        {int(rows): bounds for rows, bounds in tree["row_bounds"].items()},
        {name: Parameter(**entry) for name, entry in tree["parameters"].items()},
        sha256,
    )


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
