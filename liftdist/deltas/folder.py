"""Model folders made from a delta: applied, undone, swapped or merged.

A folder is written under a temporary name beside its target, file by file, and renamed in one step when it is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.console import Console
from liftdist.deltas import delta as deltas
from liftdist.deltas.delta import Delta
from liftdist.distributed.collectives import gather, together
from liftdist.errors import UserError
from liftdist.models import check, weights
from liftdist.models.weights import ModelFolder, threads

AT_ONCE = 1 << 26  # bytes that the disk is given to write


def change_folder(
    folder: Path,
    cache_dir: Path,
    apply: Delta | None = None,
    undo: Delta | None = None,
    output: Path | None = None,
    beside: Sequence[Delta] = (),
) -> Path:
    """Apply a delta to a Hugging Face folder, undo one, or swap one for another: to a new folder, or in place.

    In place, the complete new folder replaces the old one atomically: the folder is never a mixture of both.

    Args:
        beside: deltas that the folder holds and keeps. They change other weights, and are of the same base model or of it with
            some of the others applied; so is ``apply``.

    Raises:
        UserError: the folder is not the model that the delta applies to, or is loaded in a dtype in which the new weights are
            rounded; two deltas share weights; or the folder cannot be replaced atomically, or another process replaces it.
    """
    with contextlib.nullcontext() if output else files.locked(folder):
        return _change(folder, cache_dir, apply, undo, output, beside)


def _change(
    folder: Path,
    cache_dir: Path,
    apply: Delta | None,
    undo: Delta | None,
    output: Path | None,
    beside: Sequence[Delta],
) -> Path:
    stored = ModelFolder(folder)
    if output is None and (others := stored.stored.others()):
        raise UserError(
            f"{folder}: also holds {', '.join(others)}: other weights, which would stay as they are; give --output, or move "
            "them elsewhere"
        )
    if output is None and stored.quantised:
        raise UserError(f"{folder}: holds quantised weights, which cannot hold what a delta changes; give --output")
    weights.check_copies(stored, cache_dir)
    deltas.check_same_base(apply, undo)
    given = [delta for delta in (apply, undo) if delta is not None]
    started_from = given[0]
    every = [*given, *beside]
    for number, delta in enumerate(every, 1):
        deltas.check_disjoint(delta, every[max(number, len(given)) :])
        for name in delta.names:
            if name not in stored.file_of:
                raise UserError(
                    f"{folder}: has no {name}, which {delta.location} changes; give a folder with all tensors of its base model: "
                    "a tied head, too, which transformers leaves out when it saves"
                )
    present = [undo, *beside] if undo else beside

    def check_base(found: str) -> None:
        if apply is None:  # undone to the bit, so that the folder is what one of them began with
            fits = found in {delta.base_digest for delta in (started_from, *beside)}
        else:  # its base model is here, with some of the others applied
            some = (kept for count in range(len(beside), 0, -1) for kept in itertools.combinations(beside, count))
            fits = found == apply.base_digest or any(
                _digest(stored, present, kept) == apply.base_digest for kept in some
            )
        if not fits:
            undone = f"with {', '.join(str(delta.location) for delta in present)} undone, " if present else ""
            remedy = (
                "; name with --beside every other delta that it holds, or first apply the one that this was trained upon"
                if apply is None
                else "; undo a delta that it holds, swap with --instead-of, or keep it with --beside"
            )
            raise UserError(
                f"{folder}: {undone}is not the base model of {started_from.location} "
                f"({found[:12]}, not {started_from.base_digest[:12]}){remedy}"
            )

    known = None if present else weights.known_digest(stored, cache_dir)
    if known:
        check_base(known)
    found: dict[str, weights.Digested] = {}  # of the tensors, where the whole is not known: so that they are read once
    misfits: list[str] = []
    path = folder / "config.json"
    config = check.read_json(path) if path.exists() else None

    def edited(name: str, tensor: Tensor) -> Tensor:
        undone, applied = deltas.changes(name, *present), deltas.changes(name, apply, *beside)
        try:
            if output is None and not all(change.undoable for change in applied):
                raise UserError(
                    f"{started_from.location} holds no base values, so this could not be undone; give --output"
                )
            tensor = deltas.edit(name, tensor, undone, [], in_place=True)
            if not known:
                found[name] = weights.digested(tensor)
            before, result = tensor.dtype, deltas.edit(name, tensor, [], applied, in_place=True)
            if apply is not None and result.dtype != before:
                _check_loaded(config, name, before, result)
            return result
        except UserError as error:
            misfits.append(name)
            raise UserError(f"{folder}: {error}") from None

    target = output or folder.resolve()

    def finish(temporary: Path) -> None:  # the last moment at which nothing has changed
        if not known:
            check_base(weights.combine(found))
        _copy_others(stored, temporary, replace=output is None)
        about = temporary / deltas.ABOUT  # of the one result that the folder was
        if about.exists():
            said = check.read_json(about)
            made = said.get("made")
            if apply is not None or (
                undo is not None
                and said.get("base_digest") == undo.base_digest
                and (made == dict(undo.made) if made else not beside)
            ):
                about.unlink()

    try:
        rewrite(stored, target, edited, finish, replace=output is None)
    except UserError:
        if misfits and not present:
            check_base(weights.digest(folder, cache_dir))  # says what the whole is not
        raise
    return target


def _check_loaded(config: Mapping[str, Any] | None, name: str, before: torch.dtype, tensor: Tensor) -> None:
    """Raises ``UserError`` if a model is loaded in a dtype in which a tensor, that had ``before``, is rounded.

    The config stays as it is, for the folder is its user's."""
    if config is None:
        return
    said = config.get("dtype") or config.get("torch_dtype") or before
    loaded = getattr(torch, str(said).removeprefix("torch."), before)
    if isinstance(loaded, torch.dtype) and deltas.loses(tensor, loaded):
        wide = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} becomes {wide}, and is loaded as {loaded}, in which rounding would undo most changes; write "
            f'"dtype": "{wide}" into config.json first, or let `liftdist export DELTA --base FOLDER` make the model'
        )


def _digest(stored: ModelFolder, undo: Sequence[Delta], apply: Sequence[Delta]) -> str:
    """The digest of a folder's weights with deltas undone and then others applied."""

    def digested(name: str) -> tuple[str, weights.Digested]:
        undone, applied = deltas.changes(name, *undo), deltas.changes(name, *apply)
        return name, weights.digested(deltas.edit(name, stored.read(name), undone, applied, in_place=True))

    with threads() as pool:
        return weights.combine(dict(pool.map(digested, stored.file_of)))


def rewrite(
    stored: ModelFolder,
    target: Path,
    edit: Callable[[str, Tensor], Tensor],
    finish: Callable[[Path], None],
    replace: bool = False,
    dtypes: Mapping[torch.dtype, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write a model folder, its files split over the ranks; it appears under its name when it is complete. Collective.

    Args:
        edit: maps a tensor's name and value, which it may write to, to the new value; called by several threads.
        finish: adds the other files to the folder, on rank 0, before it appears. Its ``config.json`` then says no longer that
            weights are quantised, which were in ``stored`` and are not here.
        replace: replace an existing folder.
        dtypes: what tensors of a stored dtype become, if they become another, as far as it is known: memory holds the whole of a
            file in which some are of yet another, else a few tensors.

    Raises:
        UserError: ``target`` exists, cannot be written, or cannot be replaced atomically; or ``stored`` has changed meanwhile.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    made: Path | None = None
    held = contextlib.ExitStack()
    with together(), files.disk_errors(target):
        if rank == 0:
            if target.exists() and not replace:
                raise UserError(f"{target}: exists; remove it or give another path")
            if replace:
                _check_exchange(target)
            made = files.folder_beside(target, 0o700 if replace else 0o777)  # what it replaces may be private
            held.enter_context(files.locked(made))  # it is no left-over of a process that was killed
    temporary: Path = gather(made)[0]
    try:
        with together(), files.disk_errors(target):
            is_same = replace and stored.folder.samefile(target)
            with _unchanged(stored):
                written = _write_weights(stored, temporary, edit, rank, ranks, is_same, dtypes)
        total = sum(gather(written))
        with together(), files.disk_errors(target):
            if rank == 0:
                _write_index(stored, temporary, total)
                finish(temporary)
                if stored.quantised:
                    edit_json(temporary / "config.json", _unquantised)
                if replace:
                    _belong_like(temporary, target)
                files.publish(temporary, target, _exchange if replace else None)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what a failure left, or the replaced folder
        held.close()


@contextlib.contextmanager
def _unchanged(stored: ModelFolder) -> Iterator[None]:
    """Raises ``UserError`` if a folder has changed in the end, also where that made reading it fail."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if problem := stored.changed():
        raise UserError(f"{problem} while it was read; try again when it stays as it is") from None
    if failure is not None:
        raise failure


def _write_weights(
    stored: ModelFolder,
    folder: Path,
    edit: Callable[[str, Tensor], Tensor],
    rank: int,
    ranks: int,
    keep_metadata: bool,
    dtypes: Mapping[torch.dtype, torch.dtype],
) -> int:
    """Write this rank's share of the weight files, one at a time. Returns the bytes of their tensors."""
    members: dict[str, list[str]] = {}
    for name, file in stored.file_of.items():
        members.setdefault(file, []).append(name)
    total = 0

    def make(name: str) -> Tensor:
        return edit(name, stored.read(name)).contiguous()

    with ThreadPoolExecutor(
        1
    ) as syncing:  # the disk writes what there is while the next is made, and not all at the end
        synced: list[Future[None]] = []

        def meanwhile(path: Path, tensors: Iterator[Tensor]) -> Generator[Tensor]:
            nonlocal total
            since = 0  # bytes
            for tensor in tensors:
                yield tensor
                total += tensor.nbytes
                since += tensor.nbytes
                if since >= AT_ONCE and (not synced or synced[-1].done()):
                    synced.append(syncing.submit(files.sync_file, path))
                    since = 0

        for file in sorted(members)[rank::ranks]:
            path = folder / file
            metadata = stored.stored.headers[file].get("__metadata__") if keep_metadata else {"format": "pt"}
            about = {name: _expected(stored.info(name), dtypes) for name in members[file]}
            before = total
            try:
                made = meanwhile(path, _in_turn(make, safetensors_io.in_order(about)))
                with contextlib.closing(made):
                    safetensors_io.write(path, about, made, metadata)
            except safetensors_io.Unexpected:  # what is written first depends on all dtypes
                total = before
                tensors = dict(zip(members[file], _in_turn(make, members[file]), strict=True))
                about = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
                left = (tensors.pop(name) for name in safetensors_io.in_order(about))
                safetensors_io.write(path, about, meanwhile(path, left), metadata)
            synced.append(syncing.submit(files.sync_file, path))
        for done in synced:
            done.result()
    return total


def _expected(info: Mapping[str, Any], dtypes: Mapping[torch.dtype, torch.dtype]) -> tuple[torch.dtype, Sequence[int]]:
    """Dtype and shape that a tensor will have."""
    dtype = safetensors_io.DTYPES[info["dtype"]]
    return dtypes.get(dtype, dtype), info["shape"]


def _in_turn(make: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
    """``make`` of all names, in their order, by threads: reading, hashing and what torch does let each other run."""
    with threads() as pool:
        waiting: deque[Future[Tensor]] = deque()
        for name in names:
            waiting.append(pool.submit(make, name))
            if len(waiting) > torch.get_num_threads():  # memory holds few more than are being made
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_index(stored: ModelFolder, folder: Path, total: int) -> None:
    """Write the index of the weight files, if there is one, for the tensors that they hold now."""
    index = stored.stored.index
    if index is None:
        return
    metadata = index.get("metadata") or {}
    if metadata.get("total_size") == total and index["weight_map"] == stored.file_of:
        shutil.copyfile(stored.folder / check.INDEX, folder / check.INDEX)
    else:
        index = index | {
            "metadata": metadata | {"total_size": total},
            "weight_map": dict(sorted(stored.file_of.items())),
        }
        (folder / check.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def edit_json(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a file of settings if there is one and ``edit`` changes it."""
    if path.exists():
        before = check.read_json(path)
        if (after := edit(before)) != before:
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json`` without what is said of quantised weights, of its part on the language model, too."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return kept | ({"text_config": _unquantised(text)} if (text := config.get("text_config")) else {})


def _belong_like(folder: Path, old: Path) -> None:
    """Let a folder and all that is in it belong to whom their namesakes in ``old`` belong."""
    for path in folder.rglob("*"):
        before = old / path.relative_to(folder)
        if not path.is_symlink() and before.exists():
            files.belong_like(path, before)
    files.belong_like(folder, old)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_exchange(target: Path) -> None:
    """Raises ``UserError`` before anything is written if the folder cannot be exchanged, or what it held not be removed."""
    if problem := files.not_writable([target, *(path for path in target.rglob("*") if _is_folder(path))]):
        raise UserError(f"{problem}; give --output for a new folder")
    pair = [files.folder_beside(target) for _ in range(2)]
    try:
        _exchange(*pair)
    except UserError as error:
        raise UserError(str(error).replace(str(pair[1]), str(target))) from None
    finally:
        for path in pair:
            path.rmdir()


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two folders atomically. Raises ``UserError`` if the file system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return
    problem = ctypes.get_errno()
    if problem in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise UserError(
            f"{second}: its file system cannot replace a folder in one step; give --output for a new folder"
        )
    raise UserError(f"{second}: cannot be replaced: {os.strerror(problem)}")


def _copy_others(stored: ModelFolder, target: Path, replace: bool) -> None:
    """Copy everything in a model folder except its weights; to a new folder, nothing that would contradict them.

    Settings stay as they are, those of the tokenizer included: a delta is about weights, and the folder is its user's.
    """
    left_out = set() if replace else {name.rstrip("/") for name in say_left_out(stored)}
    for path in stored.folder.iterdir():
        if path.name in {*stored.stored.headers, check.INDEX, *left_out}:
            continue
        if path.exists():  # a link, for example into a cache, becomes a copy of its target
            files.copy(path, target / path.name)
        elif replace:  # its target may come back
            (target / path.name).symlink_to(path.readlink())


def say_left_out(stored: ModelFolder) -> list[str]:
    """Name on stderr what is not copied from a model folder to a new one, for it holds or describes other weights; return it."""
    hidden = [f"{path.name}/" for path in sorted(stored.folder.glob(".*")) if path.is_dir()]  # of git, or of a download
    others = [*stored.stored.others(), *hidden]
    if others:
        Console(enabled=True).say(
            f"not copied from {stored.folder}, so that there is one set of weights: {', '.join(others)}"
        )
    return others
