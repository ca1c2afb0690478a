"""The files that a path means: one file, a pattern, or a folder; a folder may be a data set of several splits.

data.jsonl           one file
data/*.jsonl         all files that match, sorted
data/                all data files in it; if their names are those of splits (train-0.jsonl, test.jsonl), one split's
saved/               written by ``datasets``: ``save_to_disk`` of a data set, or of one with splits
clone/               a clone of a hub's repository, whose README.md says which files belong to which subset and split
"""

from __future__ import annotations

import glob
import os
import stat
from pathlib import Path

from liftdist.data.folders import ANY_SPLIT, has_splits, in_folder
from liftdist.data.kinds import KNOWN, kind_of, of_one_kind, open_as
from liftdist.data.reading import FileSource, Joined, Source
from liftdist.errors import UserError

_POINTER = b"version https://git-lfs"


def is_local(path: str) -> bool:
    """Whether ``path`` means files here, whether or not they exist, and not a name on the hub."""
    if path.startswith("hf://"):
        return False
    if kind_of(Path(path)) is not None or path.startswith((".", "/", "~")) or glob.has_magic(path):
        return True
    try:
        return Path(path).exists()
    except OSError:  # may not be looked at
        return True


def has_no_splits(path: str) -> bool:
    """Whether ``path`` means files here of which all are taken, whatever split is asked for. Raises ``UserError``."""
    given = Path(path).expanduser()
    try:
        return is_local(path) and not (given.is_dir() and has_splits(path, given))
    except OSError as error:
        raise UserError(f"data {error.filename or path}: {error.strerror or error}") from None


def open_local(path: str, subset: str | None, split: str) -> Source:
    """The records of all files that ``path`` means.

    Raises:
        UserError: there is none, one cannot be read, is damaged or of an unknown kind, or they hold no record.
    """
    try:
        files = _files(path, subset, split)
        root = os.path.commonpath([file.parent for file in files])
        sources = [_open_file(file, str(file)) for file in files]
    except OSError as error:
        raise UserError(f"data {error.filename or path}: {error.strerror or error}") from None
    is_one = files == [Path(path).expanduser()]  # else the user is told which were found
    return _filled(path, sources[0] if is_one else Joined(sources, root))


def open_downloaded(file: Path, name: str, subset: str | None, split: str) -> Source:
    """The records of one file that came from elsewhere, which messages call ``name``. Raises ``UserError``."""
    _check_plain(name, subset, split)
    return _filled(name, _open_file(file, name))


def _filled(path: str, source: Source) -> Source:
    if not source:
        raise UserError(f"data {path}: holds no record")
    return source


def _open_file(file: Path, name: str) -> FileSource:
    kind = kind_of(Path(name))
    if not stat.S_ISREG(file.stat().st_mode) or str(file).startswith(("/dev/", "/proc/")):
        raise UserError(
            f"data {name}: is no regular file, and every rank reads the data several times; write it to a file"
        )
    if kind is None:
        raise UserError(f"data {name}: must end in {KNOWN}")
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"data {name}: is a pointer of Git LFS, not the data; in the clone: git lfs pull")
    return open_as(kind, file, name)


def _files(path: str, subset: str | None, split: str) -> list[Path]:
    given = Path(path).expanduser()
    if given.is_dir():
        return in_folder(path, given, subset, split)
    _check_plain(path, subset, split)
    if given.exists():
        return [given]
    if not glob.has_magic(path):
        raise UserError(f"data {path}: no such file")
    for folder in glob.glob(f"{given.parent}/", recursive=True):  # noqa: PTH207
        os.scandir(folder).close()  # raises if it may not be read, where the pattern would only match less
    found = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207
    files = [file for file in found if not file.is_dir()]
    if not files:
        raise UserError(f"data {path}: no file matches")
    return of_one_kind(path, files)


def _check_plain(path: str, subset: str | None, split: str) -> None:
    """Raises ``UserError`` if a subset or a split is asked for, which files do not have."""
    if subset is not None:
        raise UserError(f"data {path}: has no subset {subset}: that is for data sets; leave data.subset out")
    if split not in ANY_SPLIT:
        raise UserError(f"data {path}: has no split {split}: that is for data sets and folders; leave it out")
