"""Sources of records: local files, or a data set on the hub at one commit.

A source has a number of records and a digest of its contents, and reads any range of records, each with its location for error
messages (``reading``). ``local`` and ``folders`` find files, ``texts`` and ``tables`` read them; ``hub_sources`` has the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from liftdist import hub
from liftdist.data import hub_sources, local
from liftdist.data.local import is_local
from liftdist.data.reading import Record, Source
from liftdist.data.texts import JsonlSource
from liftdist.data_settings import DataConfig, DataSource
from liftdist.errors import UserError
from liftdist.hub import Repository

__all__ = ["JsonlSource", "Record", "Source", "fetch", "is_local", "open_records", "open_source", "repository"]

_HUB_FILE = re.compile(rf"hf://datasets/({hub.NAME})/(?P<file>[^*?\[\]]+)")


def repository(path: str, revision: str | None = None) -> Repository | None:
    """The repository that ``path`` names; None if it is a local file. Raises ``UserError`` if it can be neither."""
    if path.startswith("hf://"):
        if not (match := _HUB_FILE.fullmatch(path)):
            raise UserError(f"data {path}: names no file on the hub; as hf://datasets/OWNER/NAME/FILE it names one")
        return Repository("data", hub.DATASET, match[1], revision)
    if is_local(path):
        if revision is not None:
            raise UserError(f"data {path}: is a local file, which has no revision {revision}; leave the revision out")
        return None
    if not re.fullmatch(hub.NAME, path):
        raise UserError(f"data {path}: no such file, and no name on the hub either (OWNER/NAME)")
    return Repository("data", hub.DATASET, path, revision)


def open_source(path: str, subset: str | None, split: str, revision: str | None = None) -> Source:
    """The source of a path or hub name.

    Args:
        revision: commit, tag or branch of a hub name.

    Raises:
        UserError: it is missing, unreadable, empty or of an unknown kind, or the hub does not provide it.
    """
    if (repo := repository(path, revision)) is None:
        return local.open_local(path, subset, split)
    if (match := _HUB_FILE.fullmatch(path)) is None:
        return hub_sources.open_hub(repo, subset, split)
    return local.open_downloaded(hub_sources.download(repo, match["file"]), path, subset, split)


def open_records(source: DataSource) -> Source:
    """The records of a source. Raises ``UserError`` like :func:`open_source`."""
    return open_source(source.path, source.subset, source.split, source.revision)


def check_splits(config: DataConfig) -> None:
    """Raises ``UserError`` if a split is asked for of files that have none; the defaults ask for nothing."""
    for source in config.all_sources:
        check_split(source, "test" if source.key.startswith("data.eval_") else "train")


def check_split(source: DataSource, default: str) -> None:
    """The same for one source, with ``default`` as its split if none is set."""
    key = {"data.path": "data.split", "data.eval_path": "data.eval_split"}.get(source.key, f"{source.section}.split")
    path, split = source.path, source.split
    if split != default and (path.startswith("hf://") or local.has_no_splits(path)):
        raise UserError(f"{key}={split}: data {path} has no splits, all of it would be taken; leave {key} out")


def label(path: str, split: str) -> str:
    """What a path is called where more than one split of it may be used. Raises ``UserError``."""
    return path if path.startswith("hf://") or local.has_no_splits(path) else f"{path}, {split}"


def remember_digests(config: DataConfig, cache_dir: Path, beat: Callable[[], None] = lambda: None) -> None:
    """Hash local files and cache their digests for the ranks of this machine. Raises ``UserError`` like :func:`open_source`.

    Args:
        beat: called before each MiB that is hashed.
    """
    for given in config.all_sources:
        if is_local(given.path):
            source = open_records(given)
            source.watch(lambda _: beat())
            source.digest(cache_dir)


def fetch(config: DataConfig) -> None:
    """Download data sets on the hub, so that ranks find them. Raises ``UserError`` like :func:`open_source`."""
    for source in config.all_sources:
        if not is_local(source.path):
            open_records(source)
