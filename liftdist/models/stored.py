"""Which files of a model folder hold its weights: those that transformers loads, and what stands beside them. Imports no torch.

    model.safetensors if there is one, else the shards that model.safetensors.index.json names

Another loader may take other files: one takes every ``*.safetensors``, one goes by the index, one prefers ``consolidated*``.
Files that look like further files of this model must hold the same weights; those of other formats are left alone, but not
copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liftdist.errors import UserError
from liftdist.models import check
from liftdist.safetensors_header import header

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# what save_pretrained writes of a model that is spread over ranks: transformers prefers it to all other files
_SAVED_BY_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass
class Stored:
    """The weights of a folder, by the headers of its files.

    Args:
        headers: of each file that transformers loads.
        file_of: the file of each tensor.
        copies: further files that hold a tensor, which must be equal there.
        index: the contents of the index, unless it names other files than transformers loads.
    """

    folder: Path
    headers: dict[str, Any] = field(default_factory=dict)
    file_of: dict[str, str] = field(default_factory=dict)
    copies: dict[str, list[str]] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    def others(self) -> list[str]:
        """The files in the folder that hold weights and are not these, and the folders that hold such files, sorted."""
        mine = {*self.headers, check.INDEX} if self.index is not None else {*self.headers}
        found = []
        for path in sorted(self.folder.iterdir()):
            if path.is_dir():
                inside = () if path.name.startswith(".") else (path, *path.rglob("*"))
                if any(check.is_weights(part.name) for part in inside):
                    found.append(f"{path.name}/")
            elif check.is_weights(path.name) and path.name not in mine:
                found.append(path.name)
        return found


def resolve(folder: Path) -> Stored:
    """The files that ``AutoModelForCausalLM.from_pretrained(folder)`` loads. Reads their headers only.

    Raises:
        UserError: there are none; one is missing, damaged or cannot be read; the index contradicts them; another file of the
            folder holds other tensors; transformers would load something else besides or instead.
    """
    try:
        names = {path.name for path in folder.iterdir()}
        _check_no_other_source(folder, names)
        return _resolve(folder, names)
    except OSError as error:
        path = Path(error.filename or folder)
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            problem = f"{path.name} is a link to {path.readlink()}, which does not exist"
            raise UserError(f"{folder}: damaged weights: {problem}; restore or download them again") from None
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: damaged weights: {error}; restore or download them again") from None


def _check_no_other_source(folder: Path, names: set[str]) -> None:
    """Raises ``UserError`` where transformers does not go by the names of the files alone."""
    if "adapter_config.json" in names:
        raise UserError(
            f"{folder}: holds an adapter (adapter_config.json), which transformers adds to the weights: merge it "
            "(merge_and_unload of peft) and save the result to another folder, or remove the adapter's files"
        )
    if saved := sorted(name for name in names if _SAVED_BY_RANKS.fullmatch(name)):
        raise UserError(
            f"{folder}: holds a distributed checkpoint ({saved[0]}), which transformers prefers to other files and liftdist "
            "does not read; load it and save it with save_pretrained to another folder"
        )
    named = check.read_json(folder / "config.json").get("transformers_weights") if "config.json" in names else None
    if named is not None and named != (check.WEIGHTS if check.WEIGHTS in names else check.INDEX):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights={named} makes transformers load that file; give it the name "
            f"{check.WEIGHTS}, or {check.INDEX} if it is an index, and remove the entry"
        )


def _resolve(folder: Path, names: set[str]) -> Stored:
    index = check.read_json(folder / check.INDEX) if check.INDEX in names else None
    indexed = _weight_map(index) if index is not None else {}
    if check.WEIGHTS not in names and index is None:
        raise UserError(f"{folder}: {_why_none(names)}")
    loaded = [check.WEIGHTS] if check.WEIGHTS in names else sorted(set(indexed.values()))
    stored = Stored(folder, index=index if set(indexed.values()) <= set(loaded) else None)
    stored.headers = {name: _header(folder, name, names) for name in loaded}
    for file in loaded:
        for name in _tensors(stored.headers[file]):
            if name in stored.file_of:  # transformers reads the shards in this order
                _add_copy(stored, name, stored.headers[file][name], file)
            else:
                stored.file_of[name] = file
    shards = {name for name in names if _SHARD.fullmatch(name)}
    rivals = {
        name: _header(folder, name, names) for name in sorted((shards | set(indexed.values())) - set(stored.headers))
    }
    _check_index(indexed, stored.headers | rivals)
    for file, entries in rivals.items():
        for name in _tensors(entries):
            _add_copy(stored, name, entries[name], file)
    if stored.index is None and indexed and (lacking := sorted(set(stored.file_of) - set(indexed))):
        raise UserError(conflict(stored, lacking[0], min(rivals)))
    return stored


def _why_none(names: set[str]) -> str:
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    others = sorted(name for name in names if check.is_weights(name))
    if shards:
        return f"holds {shards[0]}, but no {check.INDEX}, without which transformers loads no shards; download it again"
    if not others:
        return f"holds no {check.WEIGHTS}"
    if others[0].endswith((".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")):
        return f"pickled weights ({others[0]}) are not loaded; convert them to safetensors"
    return f"holds no {check.WEIGHTS}, and {others[0]} is not loaded; save the model with save_pretrained"


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    """The file of each tensor, by the index. Raises ``ValueError``."""
    indexed = index.get("weight_map")
    if not isinstance(indexed, dict) or not indexed or not all(isinstance(file, str) for file in indexed.values()):
        raise ValueError(f"{check.INDEX} has no weight_map")
    if odd := [file for file in indexed.values() if Path(file).name != file]:
        raise ValueError(f"{check.INDEX} names {odd[0]}, outside the folder")
    return indexed


def _header(folder: Path, name: str, names: set[str]) -> dict[str, Any]:
    if name not in names:
        partial = any(other.startswith(f"{name}.") for other in names)
        problem = "whose download has not ended" if partial else "which is missing"
        if check.WEIGHTS in names:
            problem += f", while transformers loads {check.WEIGHTS}: remove {check.INDEX} if that file is the model"
        raise ValueError(f"{check.INDEX} names {name}, {problem}")
    found = header(folder / name)
    made_by = (found.get("__metadata__") or {}).get("format")
    if made_by in ("tf", "flax"):  # such a file has other names and transposed matrices
        raise UserError(
            f"{folder / name}: was saved from {made_by}, whose layout is another; save the model from torch"
        )
    return found


def _tensors(entries: Mapping[str, Any]) -> list[str]:
    return [name for name in entries if name != "__metadata__"]


def _check_index(indexed: Mapping[str, str], headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ``ValueError`` unless each tensor is in the file that the index says."""
    for name, file in indexed.items():
        if name not in headers[file]:
            elsewhere = [other for other, entries in headers.items() if name in entries]
            problem = f"but it is in {elsewhere[0]}" if elsewhere else "which does not hold it"
            raise ValueError(f"{check.INDEX} places {name} in {file}, {problem}")


def _add_copy(stored: Stored, name: str, entry: Mapping[str, Any], file: str) -> None:
    """Remember that ``file``, too, holds a tensor. Raises ``UserError`` if it cannot be the same."""
    known = stored.headers[stored.file_of[name]][name] if name in stored.file_of else {}
    if (known.get("dtype"), known.get("shape")) != (entry["dtype"], entry["shape"]):
        raise UserError(conflict(stored, name, file))
    stored.copies.setdefault(name, []).append(file)


def conflict(stored: Stored, name: str, other: str) -> str:
    """What to say of two files that hold different tensors of one name, or of which one lacks it."""
    if other in stored.headers:
        return (
            f"{stored.folder}: {stored.file_of[name]} and {other} hold different tensors {name}; save the model again from "
            "the one that is meant"
        )
    loaded = check.WEIGHTS if check.WEIGHTS in stored.headers else f"the files that {check.INDEX} names"
    return (
        f"{stored.folder}: holds two models, which differ in {name}: transformers loads {loaded}, not {other}; move the files of "
        "the one that is not meant elsewhere"
    )
