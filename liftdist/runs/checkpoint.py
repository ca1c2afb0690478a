"""Checkpoints: what a run holds beyond its base model, saved by all ranks, loaded on any number of them.

    checkpoints/step-00000100/
        shard-00000-of-00004.safetensors           rows [row_bounds[0], row_bounds[1]) of every trained matrix:
            NAME/indices           [k] int32       flat indices of principal weights in the whole matrix, sorted
            NAME/values            [k]             in optimizer.dtype
            NAME/optimizer.KEY     [k]             each element-wise state of the optimizer
            NAME/dropped_indices   [d] int32       the same for previously selected weights
            NAME/dropped_values    [d]             in the dtype of the model
        or, of a matrix that is trained whole, all entries of these rows:
            NAME/first             [1] int64       flat index of the first in the whole matrix
            NAME/values            [k]             in optimizer.dtype
            NAME/optimizer.KEY     [k]
            NAME/initial           [k] float32     of PiSSA alone: the values that it started from
            NAME/importance        [k]             of AdaLoRA alone, like NAME/uncertainty: averages of scores
            NAME/kept              [k] bool        of AdaLoRA's E alone, after the last choice: which ranks are kept
            NAME/places            [k] int32       of SHiRA alone: flat indices of the values in the matrix of the base
        manifest.json                              the rest of the state, size and sha256 of each file, and its own sha256

A save copies the state to the host, and a thread writes it. One rename makes the checkpoint visible, after every rank has
written, synced and read back its file; there is no rename if a rank fails. A load accepts a folder only if an attempt of this
run has committed it and its files match the manifest. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from liftdist import files
from liftdist.distributed.collectives import gather, together
from liftdist.distributed.rows import row_bounds
from liftdist.errors import UserError
from liftdist.runs import layout
from liftdist.runs.claims import Event
from liftdist.runs.layout import CHECKPOINTS, MANIFEST
from liftdist.runs.manifest import Manifest
from liftdist.runs.manifest import read as read_manifest
from liftdist.safetensors_io import TensorFile

if TYPE_CHECKING:  # with FSDP, which takes seconds to import
    from liftdist.engine.matrices import Matrix

_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 22  # bytes
FIRST = "first"  # key of a matrix of which all entries are held


@dataclass(frozen=True)
class Step:
    """A committed checkpoint."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        return self.manifest.step

    def overlapping(self, shard: int, shards: int) -> list[str]:
        """The files that hold rows of shard ``shard`` of ``shards``."""

        def overlaps(theirs: int) -> bool:
            for rows, saved in self.manifest.row_bounds.items():
                mine = row_bounds(rows, shards)
                if max(mine[shard], saved[theirs]) < min(mine[shard + 1], saved[theirs + 1]):
                    return True
            return False

        return [name for name, file in self.manifest.files.items() if overlaps(file.shard)]

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        return {name: TensorFile(self.folder / name) for name in self.manifest.files}

    @cached_property
    def _holding(self) -> dict[str, list[TensorFile]]:
        """The files that hold entries of each matrix."""
        found: dict[str, list[TensorFile]] = {}
        for file in self._files.values():
            for name in dict.fromkeys(key.rpartition("/")[0] for key in file.entries):
                found.setdefault(name, []).append(file)
        return found

    def verify(self, names: Iterable[str], beat: Callable[[], None] = lambda: None) -> None:
        """Raises ``ValueError`` or ``OSError``, which name the file, if a file differs from what was saved."""
        for name in names:
            path = self.folder / name
            if sha256_of(path, beat) != self.manifest.files[name].sha256:
                raise ValueError(f"{path} is damaged: its sha256 differs from {MANIFEST}")

    def read(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """The tensors of a method's ``state_dict``, cut to this rank's rows of ``matrices``. Reads only these slices.

        Of a matrix that is not in the checkpoint they are empty.

        Raises:
            UserError: a matrix has another shape than in the checkpoint, or the checkpoint holds one that is not in
                ``matrices``.
        """
        saved = self.manifest.parameters
        for matrix in matrices:
            if matrix.name in saved and saved[matrix.name].shape != list(matrix.shape):
                raise UserError(
                    f"{self.folder}: {matrix.name} has shape {saved[matrix.name].shape}, but {list(matrix.shape)} in the "
                    f"model; restore model.path, or use --fresh"
                )
        if missing := sorted(set(saved) - {matrix.name for matrix in matrices}):
            raise UserError(
                f"{self.folder}: holds {missing[0]}, which is not trained now; its weights would be lost: "
                f"restore selection.modules, or use --fresh"
            )
        shards = len(matrices[0].row_bounds) - 1
        parts: dict[str, list[Tensor]] = {}
        for name in self.overlapping(matrices[0].shard, shards):
            file = self._files[name]
            for matrix in matrices:
                if file in self._holding.get(matrix.name, ()):
                    begin, end = matrix.offset_local, matrix.offset_local + matrix.numel_local
                    for key, tensor in _slices(file, matrix.name, saved[matrix.name].keys, begin, end).items():
                        parts.setdefault(f"{matrix.name}/{key}", []).append(tensor)
        keys = {key: dtype for entry in saved.values() for key, dtype in entry.keys.items()}
        return {
            f"{matrix.name}/{key}": torch.cat(found)
            if (found := parts.get(f"{matrix.name}/{key}"))
            else torch.empty(0, dtype=getattr(torch, dtype))
            for matrix in matrices
            for key, dtype in keys.items()
        }

    def whole(self, name: str, key: str) -> Tensor:
        """What is kept under a key of a matrix, of all shards: ``[numel]`` of one that is trained whole, else ``[k]``."""
        return torch.cat([file.read(f"{name}/{key}") for file in self._holding[name]])

    def selected(self, name: str) -> Tensor:
        """``[k]`` int64, sorted flat indices of a matrix's principal weights."""
        return self.whole(name, "indices").long() if name in self._holding else torch.empty(0, dtype=torch.int64)

    def touched(self, name: str) -> tuple[Tensor, Tensor]:
        """Every weight of a matrix that the run has ever trained: ``[t]`` int64 sorted flat indices, and ``[t]`` values in the
        dtype of the model, rounded as in the run's model."""
        keys = self.manifest.parameters[name].keys
        dtype = getattr(torch, self.manifest.parameters[name].dtype)
        parts = [
            {key: file.read(f"{name}/{key}") for key in keys if not key.startswith("optimizer.")}
            for file in self._holding.get(name, ())
        ]
        return touched_of(parts, dtype)

    def columns(self, name: str) -> int:
        """The number of columns of a matrix."""
        return self.manifest.parameters[name].shape[1]


def touched_of(parts: Iterable[Mapping[str, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:meth:`Step.touched` from what each shard holds of a matrix, whose weights have ``dtype`` in the model."""
    pairs: list[tuple[Tensor, Tensor]] = []
    parts = list(parts)
    if any(FIRST in part for part in parts):
        whole = torch.cat([part["values"].to(dtype) for part in parts])
        return torch.arange(whole.numel()), whole
    for part in parts:
        pairs += [(part["indices"], part["values"].to(dtype)), (part["dropped_indices"], part["dropped_values"])]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *(indices.long() for indices, _ in pairs)])
    values = torch.cat([torch.empty(0, dtype=dtype), *(values for _, values in pairs)])
    if (indices[1:] > indices[:-1]).all():  # where nothing was dropped
        return indices, values
    order = indices.argsort()
    return indices[order], values[order]


def _slices(file: TensorFile, name: str, keys: Iterable[str], begin: int, end: int) -> dict[str, Tensor]:
    """The entries of one matrix in one file with flat indices in ``[begin, end)``."""
    result = {}
    if FIRST in keys:
        first, (held,) = int(file.read(f"{name}/{FIRST}")), file.entries[f"{name}/values"]["shape"]
        low, high = (min(max(end - first, 0), held) for end in (begin, end))
        return {key: file.rows(f"{name}/{key}", low, high) for key in keys if key != FIRST}
    for prefix in ("", "dropped_"):
        indices = file.read(f"{name}/{prefix}indices")
        low, high = torch.searchsorted(indices, torch.tensor([begin, end], dtype=indices.dtype)).tolist()
        result[f"{prefix}indices"] = indices[low:high]
        for key in keys:
            if key not in ("indices", "dropped_indices") and key.startswith("dropped_") == bool(prefix):
                result[key] = file.rows(f"{name}/{key}", low, high)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints exist, and which of them are valid.


def open_step(folder: Path, sha256: str | None = None) -> Step:
    """The checkpoint in ``folder``, whose files are checked by size.

    Raises:
        ValueError, OSError: the manifest is absent or damaged, or not the one with this hash, or a file has another size.
        UserError: another version of liftdist wrote it.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link")
    path = folder / MANIFEST
    manifest = read_manifest(path)
    if sha256 is not None and manifest.sha256 != sha256:
        raise ValueError(f"{path} is not the manifest that was committed")
    if manifest.step != step_number(folder.name):
        raise ValueError(f"{path} is of step {manifest.step}, but its folder is named {folder.name}")
    shards = {len(bounds) - 1 for bounds in manifest.row_bounds.values()}
    if [{file.shard for file in manifest.files.values()}] != [set(range(shard)) for shard in shards]:
        raise ValueError(f"{path} does not list one file for each of {shards} shards")
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry.bytes:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes, not {entry.bytes}")
    return Step(folder, manifest)


def accepted(run_dir: Path, history: Mapping[int, list[Event]]) -> dict[str, str]:
    """The checkpoints that the newest attempt accepted or wrote: folder name -> sha256 of its manifest.

    Raises:
        UserError: there are checkpoints, but no attempt that records them.
    """
    folders = [folder for folder in (run_dir / CHECKPOINTS).glob("step-*") if _STEP.fullmatch(folder.name)]
    if not history:
        if folders:
            raise UserError(
                f"run_dir {run_dir}: holds checkpoints, but no attempt in {layout.ATTEMPTS}/ records them; "
                f"restore {layout.ATTEMPTS}/, or use --fresh"
            )
        return {}
    newest = max(history)
    found = dict(history[newest][0].get("accepts", {}))
    for event in history[newest]:
        if event["event"] == "commit":  # even if damaged or missing now: the run must not start from step 0 unnoticed
            found[event["folder"]] = event["sha256"]
        elif event["event"] == "remove":
            found.pop(event["folder"], None)
    claim = history[newest][0]
    for folder in folders:  # the commit event may be missing: rank 0 died right after the rename, or the disk was full
        with contextlib.suppress(ValueError, OSError, KeyError):
            step = open_step(folder)
            if (step.manifest.attempt, step.manifest.nonce) == (newest, claim["nonce"]):
                found[folder.name] = step.manifest.sha256
    return found


def newest(
    run_dir: Path,
    accepts: Mapping[str, str],
    shard: int,
    shards: int,
    say: Callable[[str], None],
    set_aside: bool = True,
    beat: Callable[[], None] = lambda: None,
) -> Step | None:
    """The newest intact checkpoint; each rank checks the files that hold its rows. Collective.

    Damaged checkpoints are reported through ``say`` and, with ``set_aside``, renamed; then the next older one is tried.

    Args:
        accepts: folder name -> sha256 of its manifest, from :func:`accepted`.
        shard: of this rank, out of ``shards``.

    Raises:
        UserError: a file cannot be read but may be intact; or there are checkpoints and none is intact.
    """
    reasons: list[str] = []
    for name in gather(sorted(accepts, key=step_number, reverse=True) if _is_main() else [])[0]:
        folder = run_dir / CHECKPOINTS / name
        step, problems = _examine(folder, accepts.get(name), shard, shards, beat)
        if not problems:
            return step
        reasons.append(_refuse(step, folder, problems, say, set_aside, beat))
    if reasons:
        raise UserError(
            f"run_dir {run_dir}: none of its checkpoints is intact: {'; '.join(reasons)}; "
            f"restore one from a backup, or start again in a new directory with --fresh"
        )
    return None


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _examine(
    folder: Path, sha256: str | None, shard: int, shards: int, beat: Callable[[], None]
) -> tuple[Step | None, list[str]]:
    """The checkpoint in ``folder``, from the manifest that rank 0 reads, and the problems that any rank finds. Collective."""
    opened: Step | None = None
    reason: str | None = None
    with together():
        if _is_main():
            opened, reason = _attempted(lambda: open_step(folder, sha256))
    manifest = gather(opened.manifest if opened else None)[0]
    step = Step(folder, manifest) if manifest is not None else None
    if step is not None:
        with together():
            _, reason = _attempted(lambda: step.verify(step.overlapping(shard, shards), beat))
    return step, [f"{problem} (rank {rank})" for rank, problem in enumerate(gather(reason)) if problem]


def _refuse(
    step: Step | None,
    folder: Path,
    problems: list[str],
    say: Callable[[str], None],
    set_aside: bool,
    beat: Callable[[], None],
) -> str:
    """Report a checkpoint that cannot be used; returns the reason. Collective.

    A checkpoint counts as damaged only if rank 0 finds damage, too: another rank may merely not see the file system.
    """
    reason: str | None = problems[0].removesuffix(" (rank 0)")
    with together():
        if _is_main():
            if step is not None:
                _, reason = _attempted(lambda: step.verify(step.manifest.files, beat))
            if reason is None:
                raise UserError(
                    f"{problems[0]}; rank 0 finds it intact: run_dir must be the same folder on every machine"
                )
            if not folder.exists():
                say(f"checkpoint {folder.name} no longer exists")
            elif set_aside:
                aside = set_aside_as(folder).name
                say(f"checkpoint {folder.name} cannot be used and was renamed to {aside}: {reason}")
            else:
                say(f"checkpoint {folder.name} cannot be used: {reason}")
    return str(gather(reason)[0])


def _attempted(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of ``work``, or why the checkpoint is damaged. Raises ``UserError`` for an error that shows no damage."""
    try:
        return work(), None
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        return None, files.reason(error)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None, files.reason(error)
        raise UserError(
            f"{files.reason(error)}: the checkpoint cannot be read now and was left in place; "
            f"make the file readable and run the same command again"
        ) from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        return None, str(error)


def step_number(name: str) -> int:
    """The step in a folder's name, or -1."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else -1


def set_aside_as(folder: Path) -> Path:
    """Rename a checkpoint that is not valid, which frees its name. Returns the new path."""
    number = 1
    while (aside := folder.with_name(f"set-aside-{number}-{folder.name}")).exists():
        number += 1
    return folder.rename(aside)


def sha256_of(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """Sha256 of a file, in hex; ``beat`` is called after each chunk."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            beat()
    return state.hexdigest()
