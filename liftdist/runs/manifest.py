"""``manifest.json`` of a checkpoint: the state without its tensors, its provenance, and size and sha256 of each file.

The manifest holds a sha256 of its other contents. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftdist.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """The inputs that a state depends on. A run that continues compares its own with them."""

    config: str  # YAML text, from liftdist.config.load
    from_environment: dict[str, str]  # key of each setting from the environment -> short hash of its value
    base: str  # digest of the base model's weights
    data: str  # digest of the training samples
    commits: dict[str, str] = field(default_factory=dict)  # setting -> NAME@COMMIT of what is from the hub
    contents: dict[str, str] = field(default_factory=dict)  # setting -> digest of the other files that it names
    samples: int = 0  # number of training samples; 0 if it was not recorded


@dataclass(frozen=True)
class Snapshot:
    """The state at one step without its tensors."""

    step: int
    state: dict[str, Any]  # plain numbers, equal on all ranks
    provenance: Provenance
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # matrix -> the tensor of the base model's files that holds it
    parts: Mapping[str, Sequence[int]] = field(
        default_factory=dict
    )  # matrix -> where it is in that tensor, see part.Part
    copies: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # a trained tensor of these files -> others that must stay equal to it


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
    principal: int  # number of weights that are trained; all, if it is trained whole
    dropped: int  # number of previously selected weights
    keys: dict[str, str]  # key of each of its tensors in a file -> dtype


@dataclass(frozen=True)
class Manifest:
    snapshot: Snapshot
    attempt: int
    nonce: str  # of the attempt's claim
    files: dict[str, ShardFile]
    row_bounds: dict[int, list[int]]  # rows of a matrix -> the first row of each shard, then the number of rows
    parameters: dict[str, Parameter]
    sha256: str = ""  # of the other contents; empty until written

    @property
    def step(self) -> int:
        return self.snapshot.step

    @property
    def provenance(self) -> Provenance:
        return self.snapshot.provenance

    def write(self, path: Path) -> Manifest:
        """Write the file, which must not exist, and return the manifest with its sha256. Publishing the folder syncs it."""
        tree = dataclasses.asdict(self)
        snapshot = tree.pop("snapshot")
        tree |= snapshot.pop("provenance") | snapshot | {"format": FORMAT}
        del tree["sha256"]
        tree = json.loads(json.dumps(tree))  # as it will be read: JSON turns integer keys into strings
        sha256 = _digest(tree)
        with path.open("x", encoding="utf-8") as file:
            json.dump(tree | {"sha256": sha256}, file, sort_keys=True, indent=1)
        return dataclasses.replace(self, sha256=sha256)


def read(path: Path) -> Manifest:
    """Read and verify a manifest.

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
        raise ValueError(f"{path} is damaged: its sha256 does not match its contents")
    if tree["format"] != FORMAT:
        raise UserError(
            f"{path} has format {tree['format']}, but this version of liftdist reads format {FORMAT}; "
            f"continue with the version that wrote it (environment.json)"
        )
    provenance = Provenance(
        tree["config"],
        tree["from_environment"],
        tree["base"],
        tree["data"],
        tree.get("commits", {}),
        tree.get("contents", {}),
        tree.get("samples", 0),
    )
    return Manifest(
        Snapshot(
            tree["step"], tree["state"], provenance, *(tree.get(key, {}) for key in ("names", "parts", "copies"))
        ),  # absent in older ones
        tree["attempt"],
        tree["nonce"],
        {name: ShardFile(**entry) for name, entry in tree["files"].items()},
        {int(rows): bounds for rows, bounds in tree["row_bounds"].items()},
        {name: Parameter(**entry) for name, entry in tree["parameters"].items()},
        sha256,
    )


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
