"""Sparse checkpoints: what a run holds beyond its base model, saved by all ranks, loaded on any number of them.

    checkpoints/step-00000100/                     mode 0700
        shard-00000-of-00004.safetensors           rows [row_bounds[0], row_bounds[1]) of every trained matrix:
            NAME/indices           [k] int32       principal weights, flat in the whole matrix, sorted
            NAME/values            [k] float32
            NAME/optimizer.KEY     [k]             each element-wise state of the optimizer
            NAME/dropped_indices   [d] int32       weights that were principal before, sorted
            NAME/dropped_values    [d]             in the dtype of the model
        manifest.json                              the rest of the state, what the files must be, and a hash of itself

A save is copied to the host at once and written by a thread. It becomes visible by one rename, after every rank has written,
synced and read back its file, and only if no rank failed. A load believes a folder that this run's attempts have
committed, whose files are what the manifest says. Nothing is ever unpickled, no value is computed with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liftdist import rundir
from liftdist.config import UserError
from liftdist.mesh import Mesh, gather, row_bounds
from liftdist.rundir import Attempt, Event, Superseded
from liftdist.selection import Matrix
from liftdist.weights import header

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
KEEP = "keep"  # a file of this name in a checkpoint keeps it from being removed
_STEP = re.compile(r"step-(\d{8,})")
_PIECE = 1 << 22


@dataclass(frozen=True)
class Step:
    """A committed checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.manifest["step"])

    def overlapping(self, shard: int, shards: int) -> list[str]:
        """The files that hold rows of shard ``shard`` of ``shards``."""
        names = []
        for name, entry in self.manifest["files"].items():
            for rows, saved in self.manifest["row_bounds"].items():
                bounds = row_bounds(int(rows), shards)
                begin, end = (
                    max(bounds[shard], saved[entry["shard"]]),
                    min(bounds[shard + 1], saved[entry["shard"] + 1]),
                )
                if begin < end:
                    names.append(name)
                    break
        return names

    def verify(self, files: Iterable[str]) -> None:
        """Raises ``ValueError`` or ``OSError``, naming the file, unless ``files`` are byte for byte what was saved."""
        for name in files:
            entry, path = self.manifest["files"][name], self.folder / name
            if _sha256(path) != entry["sha256"]:
                raise ValueError(f"{path} is damaged: its contents are not what was saved")

    def read(self, matrices: Sequence[Matrix]) -> dict[str, Tensor]:
        """What ``PrincipalWeights.state_dict`` gave, cut to this rank's rows of ``matrices``, read by slices.

        A matrix that the checkpoint does not know comes without any principal weight.

        Raises:
            UserError: a matrix has another shape, or the checkpoint holds one that is not in ``matrices``.
        """
        saved = self.manifest["parameters"]
        for matrix in matrices:
            shape = saved.get(matrix.name, {"shape": list(matrix.param.shape)})["shape"]
            if shape != list(matrix.param.shape):
                raise UserError(
                    f"{self.folder}: {matrix.name} is {shape} there, {list(matrix.param.shape)} in the model"
                )
        if missing := sorted(set(saved) - {matrix.name for matrix in matrices}):
            raise UserError(f"{self.folder}: holds {missing[0]}, which is not trained now; its weights would be lost")
        shards = len(matrices[0].row_bounds) - 1
        files = self.overlapping(matrices[0].shard, shards)
        parts: dict[str, list[Tensor]] = {}
        for name in files:
            with safe_open(self.folder / name, framework="pt") as file:
                for matrix in matrices:
                    if matrix.name in saved:
                        begin, end = matrix.offset_local, matrix.offset_local + matrix.rows_local.numel()
                        for key, tensor in _slices(file, matrix.name, saved[matrix.name]["keys"], begin, end).items():
                            parts.setdefault(f"{matrix.name}/{key}", []).append(tensor)
        keys = {key: dtype for entry in saved.values() for key, dtype in entry["keys"].items()}
        return {
            f"{matrix.name}/{key}": torch.cat(found)
            if (found := parts.get(f"{matrix.name}/{key}"))
            else torch.empty(0, dtype=getattr(torch, dtype))
            for matrix in matrices
            for key, dtype in keys.items()
        }

    def touched(self, name: str) -> tuple[Tensor, Tensor]:
        """Every weight of a matrix that the run has ever trained: ``[t]`` int64 sorted flat indices, ``[t]`` values in the
        dtype of the model, as the run uses them."""
        keys = self.manifest["parameters"][name]["keys"]
        parts = []
        for file_name in self.manifest["files"]:
            with safe_open(self.folder / file_name, framework="pt") as file:
                part = {key: file.get_tensor(f"{name}/{key}") for key in keys if not key.startswith("optimizer.")}
            part["values"] = part["values"].to(part["dropped_values"].dtype)
            parts += [(part["indices"], part["values"]), (part["dropped_indices"], part["dropped_values"])]
        indices = torch.cat([indices.long() for indices, _ in parts])
        order = indices.argsort()
        return indices[order], torch.cat([values for _, values in parts])[order]


def _slices(file: Any, name: str, keys: Iterable[str], begin: int, end: int) -> dict[str, Tensor]:
    """The entries of one matrix with flat indices in ``[begin, end)``, of one file."""
    result = {}
    for prefix in ("", "dropped_"):
        indices = file.get_tensor(f"{name}/{prefix}indices")
        low, high = torch.searchsorted(indices, torch.tensor([begin, end], dtype=indices.dtype)).tolist()
        result[f"{prefix}indices"] = indices[low:high]
        for key in keys:
            if key not in ("indices", "dropped_indices") and key.startswith("dropped_") == bool(prefix):
                result[key] = file.get_slice(f"{name}/{key}")[low:high]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints there are, and which of them to believe.


def open_step(folder: Path, sha256: str | None = None) -> Step:
    """The checkpoint in ``folder``, its files checked by size.

    Raises:
        ValueError, OSError: the manifest is absent or damaged, or not the one with this hash, or a file has another size.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a symbolic link")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        own = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if own != _manifest_digest(manifest):
        raise ValueError(f"{path} is damaged: its contents do not have its hash")
    if sha256 is not None and own != sha256:
        raise ValueError(f"{path} is not the one that was committed")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, this version reads {FORMAT}")
    for name, entry in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes, not {entry['bytes']}")
    return Step(folder, manifest | {"sha256": own})


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def accepted(run_dir: Path, history: Mapping[int, list[Event]]) -> dict[str, str]:
    """Checkpoints to believe, with the hashes of their manifests: what the newest attempt accepted and what it wrote."""
    if not history:
        return {}
    newest = max(history)
    found = dict(history[newest][0].get("accepts", {}))
    for event in history[newest]:
        if event["event"] == "commit":  # even if it is damaged or gone by now: that must not pass for a fresh start
            found[event["folder"]] = event["sha256"]
        elif event["event"] == "remove":
            found.pop(event["folder"], None)
    for folder in (run_dir / FOLDER).glob("step-*"):
        with contextlib.suppress(ValueError, OSError, KeyError):
            step = open_step(folder)
            if step.manifest["attempt"] == newest:
                found[folder.name] = step.manifest["sha256"]
    return found


def newest(
    run_dir: Path,
    accepts: Mapping[str, str],
    shard: int,
    shards: int,
    say: Callable[[str], None],
    set_aside: bool = True,
) -> Step | None:
    """The newest checkpoint that all ranks find whole, each checking the files that hold its rows. Collective.

    Damaged ones are set aside by a rename and the next older one is tried.

    Raises:
        UserError: there were checkpoints, and none is whole.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    reasons: list[str] = []
    for name in gather(sorted(accepts, key=_number, reverse=True) if is_main else [])[0]:
        folder = run_dir / FOLDER / name
        step, reason = None, None
        if is_main:
            step, reason = _attempted(lambda: open_step(folder, accepts[name]))  # noqa: B023  called at once
        manifest = gather(step.manifest if step else None)[0]
        if manifest is not None:
            step = Step(folder, manifest)
            _, reason = _attempted(lambda: step.verify(step.overlapping(shard, shards)))  # noqa: B023
        problems = [problem for problem in gather(reason) if problem]
        if not problems:
            return step
        reasons.append(problems[0])
        if set_aside and is_main and folder.exists():
            say(f"checkpoint {name} cannot be used and was set aside as {_set_aside(folder).name}: {problems[0]}")
    if reasons:
        raise UserError(
            f"run_dir {run_dir}: none of its checkpoints is whole: {'; '.join(reasons)}; "
            f"--fresh starts again in a new directory"
        )
    return None


def _attempted(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What ``work`` returns, or why it could not."""
    try:
        return work(), None
    except (ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        return None, _describe(error)[1]


def _number(name: str) -> int:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else -1


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"set-aside-{number}-{folder.name}")).exists():
        number += 1
    return folder.rename(aside)


# ---------------------------------------------------------------------------------------------------------------------
# Saving.


@dataclass(frozen=True)
class Saved:
    """A save that was committed."""

    name: str
    bytes: int
    seconds: float


class Checkpointer:
    """Writes checkpoints of one attempt in the background, one at a time. Collective."""

    def __init__(self, attempt: Attempt, mesh: Mesh, keep: int, loaded: Step | None) -> None:
        self.attempt, self._mesh, self._keep = attempt, mesh, keep
        self._group = dist.new_group(backend="gloo")  # the thread talks while the main one does
        self._verified = {loaded.folder.name} if loaded else set()
        self._steps = dict(attempt.accepts)
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None
        self.last_step = loaded.number if loaded else None  # newest that is committed or being written
        if mesh.is_main:
            folder = rundir.real_folder(attempt.run_dir / FOLDER)
            for left_over in folder.glob(".step-*"):
                shutil.rmtree(left_over, ignore_errors=True)

    def save(self, state: dict[str, Tensor], matrices: Sequence[Matrix], manifest: dict[str, Any]) -> None:
        """Begin to save; waits for the save before, if it has not ended. Collective.

        Args:
            state: what ``PrincipalWeights.state_dict`` gave.
            manifest: the rest of the state, with ``step``.
        """
        self.wait()
        self.last_step = int(manifest["step"])
        self._outcome = None
        manifest = manifest | {"format": FORMAT, "attempt": self.attempt.number}
        self._thread = threading.Thread(
            target=self._run, args=(state, list(matrices), manifest), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def take_outcome(self) -> Saved | Exception | None:
        """What became of the save that ended last: the commit, or the error, alike on all ranks; once."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def wait(self, beat: Callable[[], None] = lambda: None) -> None:
        """Wait until nothing is being written; ``beat`` is called meanwhile."""
        while self._thread is not None:
            self._thread.join(1.0)
            beat()
            if not self._thread.is_alive():
                self._thread = None

    def _run(self, state: dict[str, Tensor], matrices: list[Matrix], manifest: dict[str, Any]) -> None:
        try:
            self._outcome = self._write(state, matrices, manifest)
        except Exception as error:
            self._outcome = error
            self.last_step = None

    def _write(self, state: dict[str, Tensor], matrices: list[Matrix], manifest: dict[str, Any]) -> Saved:
        mesh, shards = self._mesh, len(matrices[0].row_bounds) - 1
        replicas = mesh.world_size // shards
        replica, shard = divmod(mesh.rank, shards)
        checkpoints = self.attempt.run_dir / FOLDER
        started = time.perf_counter()

        def agreed(work: Callable[[], Any]) -> list[Any]:
            """What ``work`` returned on every rank; the first error of any rank is raised on all."""
            result, error = None, None
            try:
                result = work()
            except Exception as caught:
                error = _describe(caught)
            reports = gather((result, error), self._group)
            for _, problem in reports:
                if problem is not None:
                    kind, text = problem
                    raise Superseded(text) if kind == "Superseded" else OSError(text)
            return [result for result, _ in reports]

        def make_folder() -> str:
            if not mesh.is_main:
                return ""
            self.attempt.check_current()
            rundir.real_folder(checkpoints)
            return tempfile.mkdtemp(prefix=f".step-{manifest['step']:08d}-", dir=checkpoints)  # mode 0700

        temporary = Path(agreed(make_folder)[0])
        try:
            name = f"shard-{shard:05d}-of-{shards:05d}.safetensors"

            def write_shard() -> dict[str, Any]:
                _check_finite(state)
                entry: dict[str, Any] = {"shard": shard}
                if replicas > 1:
                    entry["state"] = _state_digest(state)
                if shard % replicas == replica:  # replicas hold the same: they share the work
                    if not temporary.is_dir():
                        raise OSError(f"{temporary} is not to be seen on this rank: run_dir must be shared by all")
                    entry |= _write_file(temporary / name, state)
                    entry["name"] = name
                return entry

            entries = agreed(write_shard)
            counts = torch.zeros(len(matrices), 2, dtype=torch.int64)  # principal and dropped weights, over all shards
            if replica == 0:
                sizes = [[state[f"{m.name}/{key}"].numel() for key in ("indices", "dropped_indices")] for m in matrices]
                counts.copy_(torch.tensor(sizes))
            dist.all_reduce(counts, group=self._group)
            for entry in entries:
                if entry.get("state") != entries[entry["shard"]].get("state"):
                    raise RuntimeError(f"replicas have diverged: they hold different weights in shard {entry['shard']}")

            def commit() -> str:
                if not mesh.is_main:
                    return ""
                files = {
                    entry["name"]: {key: entry[key] for key in ("shard", "bytes", "sha256")}
                    for entry in sorted(entries, key=lambda entry: entry["shard"])
                    if "name" in entry
                }
                manifest["files"] = files
                manifest["row_bounds"] = {str(m.param.shape[0]): list(m.row_bounds) for m in matrices}
                manifest["parameters"] = {
                    m.name: {
                        "shape": list(m.param.shape),
                        "dtype": str(m.param.dtype).removeprefix("torch."),
                        "principal": principal,
                        "dropped": dropped,
                        "keys": {
                            key.removeprefix(f"{m.name}/"): str(tensor.dtype).removeprefix("torch.")
                            for key, tensor in state.items()
                            if key.rpartition("/")[0] == m.name
                        },
                    }
                    for m, (principal, dropped) in zip(matrices, counts.tolist(), strict=True)
                }
                return self._commit(temporary, manifest)

            folder = agreed(commit)[0]
        except BaseException:
            if mesh.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._verified.add(folder)
        saved = Saved(folder, sum(entry.get("bytes", 0) for entry in entries), time.perf_counter() - started)
        if mesh.is_main:
            fields = {"bytes": saved.bytes, "seconds": round(saved.seconds, 3)}
            self.attempt.note("commit", step=manifest["step"], folder=folder, sha256=self._steps[folder], **fields)
            self._remove_old()
        return saved

    def _commit(self, temporary: Path, manifest: dict[str, Any]) -> str:
        """Make a written folder visible under its name."""
        manifest["sha256"] = _manifest_digest(manifest)
        with (temporary / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(manifest, file, sort_keys=True, indent=1)
            file.flush()
            os.fsync(file.fileno())
        rundir.sync_folder(temporary)
        target = temporary.with_name(f"step-{manifest['step']:08d}")
        self.attempt.check_current()
        if target.is_symlink() or target.exists():  # of an attempt that is not believed
            _set_aside(target)
        temporary.rename(target)
        rundir.sync_folder(target.parent)
        self._steps[target.name] = manifest["sha256"]
        return target.name

    def _remove_old(self) -> None:
        """Remove what is older than the newest verified checkpoints, unless it is marked to be kept."""
        kept = sorted(self._verified & set(self._steps), key=_number)[-self._keep :]
        if len(kept) < self._keep:
            return
        for name in [name for name in self._steps if _number(name) < _number(kept[0])]:
            folder = self.attempt.run_dir / FOLDER / name
            if (folder / KEEP).exists():
                continue
            with contextlib.suppress(OSError, Superseded):
                self.attempt.check_current()
                self.attempt.note("remove", folder=name)
                del self._steps[name]
                shutil.rmtree(folder.rename(folder.with_name(f".{name}-removed-{self.attempt.number}")))


def _describe(error: Exception) -> tuple[str, str]:
    if isinstance(error, OSError) and error.filename:
        return "OSError", f"{error.filename}: {error.strerror}"
    return type(error).__name__, str(error)


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key.rpartition('/')[0]} has weights or optimizer state that is not finite: not saved")


def _write_file(path: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    """Write, sync, and read back from the disk what one rank holds."""
    try:
        save_file(state, path)
        with path.open("rb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is read back comes from the disk
        with safe_open(path, framework="pt") as saved:
            for key, tensor in state.items():
                if not torch.equal(saved.get_tensor(key), tensor):
                    raise OSError(f"{path}: the disk does not hold what was written")
        header(path)
        return {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            state.update(piece)
    return state.hexdigest()


def _state_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
