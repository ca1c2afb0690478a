"""A folder of versions, which one process writes and any number follow.

    DIR/lock                                   held by the process that writes
    DIR/version-00000007/manifest.json         what it is of, digests, and its own sha256
                         changes.safetensors   the difference to version 6, see state.py; not in the first version
                         delta.safetensors     all changes to the base model, as `liftdist apply` takes them; in the newest two

A version appears whole, by one rename, under a number that nothing has. Its manifest names the sha256 of the manifest before
it, the digest of the state after it, and size and sha256 of its files: what is missing, damaged or of another run is noticed.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from liftdist import digests, files
from liftdist.errors import UserError

FORMAT = "liftdist-sync-1"
MANIFEST, CHANGES, FULL, LOCK = "manifest.json", "changes.safetensors", "delta.safetensors", "lock"
_NAME = re.compile(r"version-(\d{8,})")


@dataclass(frozen=True)
class Stored:
    """A file of a version."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Version:
    """The manifest of a version."""

    number: int  # from 1
    step: int  # of the run; smaller than that of the version before if the run went back to an older checkpoint
    run: str  # name of its directory
    stream: str  # equal in all versions of one run
    source: str  # sha256 of the checkpoint that it was made from; empty if of none
    base: str  # digest of the base model
    origin: Mapping[str, str]  # base_model and base_commit, if it is of the hub
    previous: str  # sha256 of the manifest before; empty in the first
    state: str  # digest of the state after it
    files: Mapping[str, Stored]
    sha256: str = ""  # of the other contents; empty until written

    def write(self, folder: Path) -> Version:
        """Write the manifest into a folder, and return it with its sha256. Raises ``OSError``."""
        tree = dataclasses.asdict(self) | {"format": FORMAT}
        del tree["sha256"]
        sha256 = _sha256(tree)
        (folder / MANIFEST).write_text(
            json.dumps(tree | {"sha256": sha256}, sort_keys=True, indent=1), encoding="utf-8"
        )
        return dataclasses.replace(self, sha256=sha256)


def read(folder: Path) -> Version:
    """The manifest in a version folder. Raises ``ValueError`` or ``OSError``, which name it, if it is absent or damaged."""
    path = folder / MANIFEST
    try:
        tree = json.loads(files.read(path))
        sha256, kind = tree.pop("sha256"), tree["format"]
        if sha256 != _sha256(tree) or tree["number"] != number_of(folder.name):
            raise ValueError("its sha256 or its number does not match its contents")
        if kind != FORMAT:
            raise ValueError(f"has format {kind}, this version of liftdist reads {FORMAT}")
        held = {name: Stored(**file) for name, file in tree.pop("files").items()}
        del tree["format"]
        return Version(**tree, files=held, sha256=sha256)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def check_folder(folder: Path, stream: str | None) -> None:
    """Raises ``UserError`` if versions of a run cannot be published in a folder, because of what it is or holds.

    Args:
        stream: of the run; None if it has not begun.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a new folder")
    if not (folder / LOCK).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files than versions of a run; give a new folder")
    for number in numbers(folder)[-1:]:
        try:
            found = read(path_of(folder, number))
        except (ValueError, OSError):
            return  # damaged: who reads it tells of it
        if found.stream != stream:
            raise UserError(f"{folder}: holds versions of another run ({found.run}); give a new folder")


def _sha256(tree: Mapping[str, object]) -> str:
    return digests.of_bytes(json.dumps(tree, sort_keys=True).encode())


def numbers(folder: Path) -> list[int]:
    """The versions in a folder, ascending."""
    return sorted(number for path in folder.glob("version-*") if (number := number_of(path.name)))


def number_of(name: str) -> int:
    """The number in a folder's name, or 0."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def path_of(folder: Path, number: int) -> Path:
    """The folder of a version."""
    return folder / f"version-{number:08d}"
