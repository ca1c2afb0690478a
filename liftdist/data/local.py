"""The files that a path means: one file, a pattern, or a folder; a folder may be a data set of several splits.

data.jsonl           one file
data/*.jsonl         all files that match, sorted
data/                all data files in it; if their names are those of splits (train-0.jsonl, test.jsonl), one split's
saved/               written by ``datasets``: ``save_to_disk`` of a data set, or of one with splits
clone/               a clone of a hub's repository, whose README.md says which files belong to which subset and split
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from liftdist.data.reading import FileSource, Joined, Source
from liftdist.data.tables import ArrowSource, ParquetSource
from liftdist.data.texts import OPEN as COMPRESSIONS
from liftdist.data.texts import CsvSource, TsvSource, json_source
from liftdist.errors import UserError

_TEXTS: dict[str, Callable[[Path, str], FileSource]] = {
    ".jsonl": json_source, ".ndjson": json_source, ".json": json_source, ".csv": CsvSource, ".tsv": TsvSource,
}  # fmt: skip
_TABLES: dict[str, Callable[[Path, str], FileSource]] = {".parquet": ParquetSource, ".arrow": ArrowSource}
SUFFIXES = (*_TEXTS, *_TABLES)
_KNOWN = f"{', '.join(SUFFIXES)}; text files also with {', '.join(COMPRESSIONS)} after that"

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_ANY_SPLIT = ("train", "test")  # the defaults of data.split and data.eval_split
_POINTER = b"version https://git-lfs"


def is_local(path: str) -> bool:
    """Whether ``path`` means files here, whether or not they exist, and not a name on the hub."""
    if path.startswith("hf://"):
        return False
    if _kind(Path(path)) is not None or path.startswith((".", "/", "~")) or glob.has_magic(path):
        return True
    try:
        return Path(path).exists()
    except OSError:  # may not be looked at
        return True


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
    kind = _kind(Path(name))
    if not stat.S_ISREG(file.stat().st_mode) or str(file).startswith(("/dev/", "/proc/")):
        raise UserError(
            f"data {name}: is no regular file, and every rank reads the data several times; write it to a file"
        )
    if kind is None:
        raise UserError(f"data {name}: must end in {_KNOWN}")
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"data {name}: is a pointer of Git LFS, not the data; in the clone: git lfs pull")
    return {**_TEXTS, **_TABLES}[kind](file, name)


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of a compression; None if it is none of those known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in _TEXTS else None
    return suffix if suffix in SUFFIXES else None


def _files(path: str, subset: str | None, split: str) -> list[Path]:
    given = Path(path).expanduser()
    if given.is_dir():
        return _in_folder(path, given, subset, split)
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
    return _of_one_kind(path, files)


def _check_plain(path: str, subset: str | None, split: str) -> None:
    """Raises ``UserError`` if a subset or a split is asked for, which files do not have."""
    if subset is not None:
        raise UserError(f"data {path}: has no subset {subset}: that is for data sets; leave data.subset out")
    if split not in _ANY_SPLIT:
        raise UserError(f"data {path}: has no split {split}: that is for data sets and folders; leave it out")


def _in_folder(path: str, folder: Path, subset: str | None, split: str) -> list[Path]:
    os.scandir(folder).close()  # raises if it may not be read
    if (folder / "dataset_dict.json").is_file():
        _no_subset(path, subset)
        return _saved(path, folder / _chosen(path, split, _read_json(folder / "dataset_dict.json")["splits"]))
    if (folder / "state.json").is_file():
        _no_subset(path, subset)
        if split not in _ANY_SPLIT:
            raise UserError(f"data {path}: is one data set without splits, so it has no {split}; leave it out")
        return _saved(path, folder)
    if configs := _configs(path, folder / "README.md"):
        return _cloned(path, folder, configs, subset, split)
    _no_subset(path, subset)
    return _complete(path, _by_names(path, _data_files(path, folder), split))


def _no_subset(path: str, subset: str | None) -> None:
    if subset is not None:
        raise UserError(f"data {path}: names no subsets, so it has no {subset}; leave data.subset out")


def _chosen(path: str, split: str, splits: Iterable[str]) -> str:
    splits = list(splits)
    if split not in splits:
        raise UserError(f"data {path}: has no split {split}; those it has: {', '.join(splits)}")
    return split


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"data {file}: {error}") from None


def _saved(path: str, folder: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` wrote."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"data {path}: is saved with an index beside its rows; save it again with a current `datasets`")
    return [folder / file["filename"] for file in state["_data_files"]]


def _configs(path: str, readme: Path) -> list[dict[str, Any]]:
    """The subsets that the head of a README.md lists, with the files of each."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        listed = (yaml.safe_load(head[1]) or {}) if head else {}
    except yaml.YAMLError:
        raise UserError(
            f"data {path}: the head of its README.md is not YAML; name the files: {path}/FOLDER/*"
        ) from None
    configs = listed.get("configs", []) if isinstance(listed, dict) else []
    return [config for config in configs if isinstance(config, dict) and config.get("data_files")]


def _cloned(path: str, folder: Path, configs: list[dict[str, Any]], subset: str | None, split: str) -> list[Path]:
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if subset is None:
        default = [name for name, config in by_name.items() if config.get("default") or name == "default"]
        if len(by_name) > 1 and not default:
            raise UserError(f"data {path}: data.subset must name one of its subsets: {', '.join(by_name)}")
        subset = default[0] if default else next(iter(by_name))
    if subset not in by_name:
        raise UserError(f"data {path}: has no subset {subset}; those it has: {', '.join(by_name)}")
    given = by_name[subset]["data_files"]
    if not isinstance(given, list):
        given = [given]
    if not all(isinstance(entry, dict) for entry in given):
        given = [{"split": "train", "path": given}]
    patterns = {entry["split"]: entry["path"] for entry in given}
    wanted = patterns[_chosen(path, split, patterns)]
    base = folder / by_name[subset].get("data_dir", "")
    files = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        found = [file for file in sorted(base.glob(pattern)) if file.is_file()]
        if not found:
            raise UserError(f"data {path}: its README.md names {pattern} for split {split}, and no file matches")
        files += found
    return _complete(path, _of_one_kind(path, files))


def _data_files(path: str, folder: Path) -> list[Path]:
    """The data files in a folder or, if there are none, in the one folder below that has some."""
    by_folder: dict[Path, list[Path]] = {}
    seen = set()

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(place).resolve()
        folders[:] = [] if here in seen else sorted(name for name in folders if not name.startswith("."))
        if here in seen:  # a link to what stands above it
            continue
        seen.add(here)
        kept = [name for name in sorted(names) if not name.startswith((".", "_")) and name not in _DESCRIPTIONS]
        files = [Path(place, name) for name in kept]
        if data := [file for file in files if any(suffix.lower() in SUFFIXES for suffix in file.suffixes)]:
            by_folder[Path(place)] = data
    if not by_folder:
        raise UserError(f"data {path}: holds no data file; these must end in {_KNOWN}")
    if len(by_folder) > 1:
        shown = ", ".join(os.path.relpath(place, folder) for place in by_folder)
        raise UserError(f"data {path}: holds data in several folders ({shown}); name one of them, or a pattern")
    return _of_one_kind(path, next(iter(by_folder.values())))


def _by_names(path: str, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split, where files are named after splits; all if none is."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [_SPLITS[word] for word in re.split(r"[-_. \d]+", file.name.lower()) if word in _SPLITS]
        splits.setdefault(words[0] if len(set(words)) == 1 else "", []).append(file)
    unnamed = splits.pop("", [])
    if not splits:
        if split not in _ANY_SPLIT:
            raise UserError(f"data {path}: no file in it is named after split {split}; leave it out, or name the file")
        return unnamed
    if unnamed:
        named = next(iter(splits.values()))[0].name
        raise UserError(
            f"data {path}: {named} is named after a split, and {unnamed[0].name} is not; name the files, as a pattern"
        )
    return splits[_chosen(path, split, splits)]


def _complete(path: str, files: list[Path]) -> list[Path]:
    """Raises ``UserError`` if a part is missing of files that are numbered as ``NAME-00001-of-00004``."""
    parts: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.match(r"(.*)-(\d+)-of-(\d+)\.", file.name):
            parts.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), found in parts.items():
        if len(found) < count:
            raise UserError(
                f"data {path}: holds {len(found)} of {count} parts of {name}; fetch the others, or name the files, as a pattern"
            )
    return files


def _of_one_kind(path: str, files: list[Path]) -> list[Path]:
    """Raises ``UserError`` if the files are of several kinds, or one of them of none, or two hold the same."""
    for file in files:
        if _kind(file) is None:
            raise UserError(f"data {file}: must end in {_KNOWN}")
    kinds = {".json" if _TEXTS.get(kind) is json_source else kind for file in files if (kind := _kind(file))}
    if len(kinds) > 1:
        raise UserError(
            f"data {path}: holds files of several kinds ({', '.join(sorted(kinds))}); name those of one: *.jsonl"
        )
    seen: dict[str, Path] = {}
    for file in files:
        bare = str(file).removesuffix(file.suffix) if file.suffix.lower() in COMPRESSIONS else str(file)
        if bare in seen:
            raise UserError(f"data {path}: {seen[bare].name} and {file.name} look like the same data; name one of them")
        seen[bare] = file
    return files
