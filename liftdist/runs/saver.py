"""Saving checkpoints in the background, committing them together, and removing old ones.

    state on the device -> copy on the host | thread: one file per shard, synced and read back -> manifest -> rename

Only the copy, left of the bar, blocks training. The thread's collectives use a process group of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from liftdist import files, safetensors_header, safetensors_io
from liftdist.distributed.collectives import gather, together
from liftdist.distributed.mesh import Mesh
from liftdist.distributed.rows import row_bounds
from liftdist.engine.matrices import Matrix
from liftdist.errors import UserError
from liftdist.runs import checkpoint
from liftdist.runs.checkpoint import Step, step_number
from liftdist.runs.claims import Attempt, Superseded
from liftdist.runs.layout import CHECKPOINTS, MANIFEST
from liftdist.runs.manifest import Manifest, Parameter, ShardFile, Snapshot

KEEP = "keep"  # a checkpoint that holds a file of this name is not removed


@dataclass(frozen=True)
class Saved:
    """A committed save."""

    name: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Written:
    """One rank's part of a save."""

    shard: int
    state: str | None  # digest of the rank's tensors; None without replicas
    name: str = ""
    file: ShardFile | None = None  # None if another replica writes this shard


class Checkpointer:
    """Writes checkpoints of one attempt in the background, one at a time. Collective."""

    def __init__(self, attempt: Attempt, mesh: Mesh, keep: int, loaded: Step | None) -> None:
        self.attempt, self._keep = attempt, keep
        self.best: int | None = None  # a step whose checkpoint is kept besides the newest
        self._rank, self._ranks, self._is_main = mesh.rank, mesh.world_size, mesh.is_main
        self._group = dist.new_group(backend="gloo")  # the main thread uses the default group meanwhile
        self._verified = {loaded.folder.name} if loaded else set()
        self._steps = dict(attempt.accepts)
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None
        self.last_step = loaded.number if loaded else None  # newest that is committed or being written
        with together():
            if self._is_main:
                folder = files.real_folder(attempt.run_dir / CHECKPOINTS)
                for left_over in folder.glob(".step-*"):
                    shutil.rmtree(left_over, ignore_errors=True)

    def save(self, state: dict[str, Tensor], matrices: Sequence[Matrix], snapshot: Snapshot) -> None:
        """Start a save, after waiting for the previous one to end. Collective.

        Args:
            state: the tensors of this rank, as a method's ``state_dict`` gives them.
        """
        self.wait()
        self.last_step = snapshot.step
        self._outcome = None
        self._thread = threading.Thread(
            target=self._run, args=(state, list(matrices), snapshot), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def take_outcome(self) -> Saved | Exception | None:
        """The outcome of the last save, equal on all ranks; None while it runs, and once it has been taken.

        A :class:`Saved`; an ``OSError`` if the disk failed; or any other error, which ends the run.
        """
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

    def _run(self, state: dict[str, Tensor], matrices: list[Matrix], snapshot: Snapshot) -> None:
        try:
            self._outcome = self._write(state, matrices, snapshot)
        except Exception as error:
            self._outcome = error
            self.last_step = None

    def _write(self, state: dict[str, Tensor], matrices: list[Matrix], snapshot: Snapshot) -> Saved:
        started = time.perf_counter()
        temporary = Path(self._agreed(lambda: self._make_folder(snapshot.step))[0])
        try:
            shards = len(matrices[0].row_bounds) - 1
            entries = self._agreed(lambda: self._write_shard(temporary, state, shards))
            for entry in entries:
                if entry.state != entries[entry.shard].state:
                    raise RuntimeError(f"replicas have diverged: they hold different weights in shard {entry.shard}")
            parameters = self._describe_parameters(state, matrices, shards)
            written = sorted((entry for entry in entries if entry.file), key=lambda entry: entry.shard)
            manifest = Manifest(
                snapshot,
                self.attempt.number,
                self.attempt.nonce,
                {entry.name: entry.file for entry in written if entry.file},
                {
                    rows: list(row_bounds(rows, shards))
                    for rows in sorted({matrix.param.shape[0] for matrix in matrices})
                },
                parameters,
            )
            committed = self._agreed(lambda: self._commit(temporary, manifest))[0]
        except BaseException:
            if self._is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._verified.add(committed)
        size = sum(entry.file.bytes for entry in written if entry.file)
        saved = Saved(committed, size, time.perf_counter() - started)
        if self._is_main:
            fields = {"bytes": saved.bytes, "seconds": round(saved.seconds, 3)}
            self.attempt.note("commit", step=snapshot.step, folder=committed, sha256=self._steps[committed], **fields)
            self._remove_old()
        return saved

    def _agreed(self, work: Callable[[], Any]) -> list[Any]:
        """The results of ``work`` on every rank, by rank; the error of the lowest failed rank is raised on all. Collective.

        Raises:
            OSError: the disk failed. UserError, Superseded: unchanged. RuntimeError: any other error, which is a bug.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = _describe(caught)
        for rank, (_, problem) in enumerate(reports := gather((result, error), self._group)):
            if problem is not None:
                kind, text = problem
                raise kind(f"rank {rank}: {text}" if kind is RuntimeError else text)
        return [result for result, _ in reports]

    def _make_folder(self, step: int) -> str:
        if not self._is_main:
            return ""
        self.attempt.check_current()
        folder = files.real_folder(self.attempt.run_dir / CHECKPOINTS)
        return str(files.folder_beside(folder / f"step-{step:08d}"))

    def _write_shard(self, temporary: Path, state: dict[str, Tensor], shards: int) -> _Written:
        """Write this rank's shard, unless another replica does: replicas hold equal shards and split the files."""
        _check_finite(state)
        replicas = self._ranks // shards
        replica, shard = divmod(self._rank, shards)
        name = f"shard-{shard:05d}-of-{shards:05d}.safetensors"
        digest = safetensors_io.digest_of(sorted(state.items())) if replicas > 1 else None
        if shard % replicas != replica:
            return _Written(shard, digest)
        if not temporary.is_dir():
            raise OSError(
                f"{temporary} does not exist on this rank: run_dir must be on a file system that all ranks share"
            )
        return _Written(shard, digest, name, _write_file(temporary / name, _without_empty(state), shard))

    def _describe_parameters(
        self, state: dict[str, Tensor], matrices: list[Matrix], shards: int
    ) -> dict[str, Parameter]:
        """The manifest's entry of every matrix, by name. Collective."""
        counts = torch.zeros(len(matrices), 2, dtype=torch.int64)  # principal and dropped weights, over all shards
        if self._rank < shards:  # count the first replica only
            empty = torch.empty(0)
            sizes = [
                [state[f"{m.name}/values"].numel(), state.get(f"{m.name}/dropped_values", empty).numel()]
                for m in matrices
            ]
            counts.copy_(torch.tensor(sizes))
        dist.all_reduce(counts, group=self._group)
        keys: dict[str, dict[str, str]] = {}
        for key, tensor in state.items():
            name, _, kind = key.rpartition("/")
            keys.setdefault(name, {})[kind] = str(tensor.dtype).removeprefix("torch.")
        return {
            m.name: Parameter(list(m.shape), str(m.dtype).removeprefix("torch."), principal, dropped, keys[m.name])
            for m, (principal, dropped) in zip(matrices, counts.tolist(), strict=True)
        }

    def _commit(self, temporary: Path, manifest: Manifest) -> str:
        """Make a written folder visible under its name."""
        if not self._is_main:
            return ""
        manifest = manifest.write(temporary / MANIFEST)
        target = temporary.with_name(f"step-{manifest.step:08d}")
        self.attempt.check_current()
        if target.is_symlink() or target.exists():  # written by a superseded attempt
            checkpoint.set_aside_as(target)
        files.publish(temporary, target)
        self._steps[target.name] = manifest.sha256
        return target.name

    def _remove_old(self) -> None:
        """Remove checkpoints older than the newest ``keep`` verified ones, except the best and those with a ``KEEP`` file."""
        kept = sorted(self._verified & set(self._steps), key=step_number)[-self._keep :]
        if len(kept) < self._keep:
            return
        for name in [name for name in self._steps if -1 < step_number(name) < step_number(kept[0])]:
            folder = self.attempt.run_dir / CHECKPOINTS / name
            if (folder / KEEP).exists() or step_number(name) == self.best:
                continue
            with contextlib.suppress(OSError, Superseded):
                self.attempt.check_current()
                self.attempt.note("remove", folder=name)
                del self._steps[name]
                shutil.rmtree(folder.rename(folder.with_name(f".{name}-removed-{self.attempt.number}")))


def _describe(error: Exception) -> tuple[type[Exception], str]:
    """The type and the message of the error to raise on all ranks; the message of a bug includes its traceback."""
    for kind in (Superseded, UserError):
        if isinstance(error, kind):
            return kind, str(error)
    if isinstance(error, OSError):
        return OSError, files.reason(error)
    return (
        RuntimeError,
        f"saving failed: {type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__))}",
    )


def _without_empty(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without matrices of which there is nothing here: of experts, most shards hold no row."""
    held = {key.rpartition("/")[0] for key, tensor in state.items() if tensor.numel()}
    return {key: tensor for key, tensor in state.items() if key.rpartition("/")[0] in held}


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{key.rpartition('/')[0]} has weights or optimizer state that is not finite and is not saved; "
                f"continue from the newest checkpoint with a lower optimizer.lr and --allow-changes"
            )


def _write_file(path: Path, state: dict[str, Tensor], shard: int) -> ShardFile:
    """Write and sync this rank's tensors, and read them back from the disk."""
    try:
        safetensors_io.save(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the check reads from the disk
        with safe_open(path, framework="pt") as saved:
            for key, tensor in state.items():
                if not torch.equal(saved.get_tensor(key), tensor):
                    raise OSError(f"{path}: reading it back gave other contents than were written")
        safetensors_header.header(path)
        return ShardFile(shard, path.stat().st_size, checkpoint.sha256_of(path))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
