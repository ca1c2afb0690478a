"""The data files of a folder: plain ones, of one split if they are named so; a saved data set; a clone of a hub repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from liftdist.data.kinds import KNOWN, SUFFIXES, of_one_kind
from liftdist.errors import UserError

_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
ANY_SPLIT = ("train", "test")  # the defaults of data.split and data.eval_split


def in_folder(path: str, folder: Path, subset: str | None, split: str) -> list[Path]:
    """The files in a folder, of a subset and a split if it has such.

    Raises:
        UserError: it is not clear which are meant, or some are missing.
        OSError: it may not be read.
    """
    os.scandir(folder).close()  # raises if it may not be read
    if (folder / "dataset_dict.json").is_file():
        _no_subset(path, subset)
        about = _read_json(folder / "dataset_dict.json")
        return _saved(path, folder / _chosen(path, split, about.get("splits", [])))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        _no_subset(path, subset)
        if split not in ANY_SPLIT:
            raise UserError(f"data {path}: is one data set without splits, so it has no {split}; leave it out")
        return _saved(path, folder)
    if configs := _configs(path, folder / "README.md"):
        return _cloned(path, folder, configs, subset, split)
    _no_subset(path, subset)
    return _complete(path, _by_names(path, _data_files(path, folder), split))


def has_splits(path: str, folder: Path) -> bool:
    """Whether a folder holds several splits, or files that are named after one. Raises as :func:`in_folder`."""
    if (folder / "dataset_dict.json").is_file() or _configs(path, folder / "README.md"):
        return True
    return not (folder / "state.json").is_file() and any(map(_split_of, _data_files(path, folder)))


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
    try:
        return [folder / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"data {folder / 'state.json'}: names no data files; save the data set again") from None


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
    try:
        patterns = {str(entry["split"]): entry["path"] for entry in given}
        wanted = patterns[_chosen(path, split, patterns)]
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        base = folder / by_name[subset].get("data_dir", "")
        strange = next((one for one in wanted if ".." in Path(one).parts or Path(one).is_absolute()), None)
    except (KeyError, TypeError):
        strange = given
    if strange is not None:
        raise UserError(
            f"data {path}: its README.md lists files as {strange!r}, which is no path in it; name the files, as a pattern"
        )
    files = []
    for pattern in wanted:
        found = [file for file in sorted(base.glob(pattern)) if file.is_file()]
        if not found:
            raise UserError(f"data {path}: its README.md names {pattern} for split {split}, and no file matches")
        files += found
    return _complete(path, of_one_kind(path, files))


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
        raise UserError(f"data {path}: holds no data file; these must end in {KNOWN}")
    if len(by_folder) > 1:
        shown = ", ".join(os.path.relpath(place, folder) for place in by_folder)
        raise UserError(f"data {path}: holds data in several folders ({shown}); name one of them, or a pattern")
    return of_one_kind(path, next(iter(by_folder.values())))


def _by_names(path: str, files: Sequence[Path], split: str) -> list[Path]:
    """The files of a split, where files are named after splits; all if none is."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    unnamed = splits.pop("", [])
    if not splits:
        if split not in ANY_SPLIT:
            raise UserError(f"data {path}: no file in it is named after split {split}; leave it out, or name the file")
        return unnamed
    if unnamed:
        named = next(iter(splits.values()))[0].name
        raise UserError(
            f"data {path}: {named} is named after a split, and {unnamed[0].name} is not; name the files, as a pattern"
        )
    return splits[_chosen(path, split, splits)]


def _split_of(file: Path) -> str:
    """The split that a file is named after; empty if there is none, or several."""
    words = {_SPLITS[word] for word in re.split(r"[-_. \d]+", file.name.lower()) if word in _SPLITS}
    return words.pop() if len(words) == 1 else ""


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
