"""Saving checkpoints in the background, committing them together, and removing old ones.

    state on the device -> copy on the host | thread: file a shard, synced and read back -> manifest -> rename

Only what is left of the bar holds up training. The thread's collectives have a process group of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.distributed.collectives import gather, together
from liftdist.distributed.mesh import Mesh
from liftdist.engine.matrices import Matrix
from liftdist.errors import UserError
from liftdist.runs import checkpoint
from liftdist.runs.checkpoint import Step, step_number
from liftdist.runs.claims import Attempt, Superseded
from liftdist.runs.layout import CHECKPOINTS, MANIFEST

KEEP = "keep"  # a file of this name in a checkpoint keeps it from being removed


@dataclass(frozen=True)
class Saved:
    """A save that was committed."""

    name: str
    bytes: int
    seconds: float


class Checkpointer:
    """Writes checkpoints of one attempt in the background, one at a time. Collective."""

    def __init__(self, attempt: Attempt, mesh: Mesh, keep: int, loaded: Step | None) -> None:
        self.attempt, self._keep = attempt, keep
        self._rank, self._ranks, self._is_main = mesh.rank, mesh.world_size, mesh.is_main
        self._group = dist.new_group(backend="gloo")  # the thread talks while the main one does
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

    def save(self, state: dict[str, Tensor], matrices: Sequence[Matrix], manifest: dict[str, Any]) -> None:
        """Begin to save; waits for the save before, if it has not ended. Collective.

        Args:
            state: what ``PrincipalWeights.state_dict`` gave.
            manifest: the rest of the state, with ``step``.
        """
        self.wait()
        self.last_step = int(manifest["step"])
        self._outcome = None
        manifest = manifest | {"format": checkpoint.FORMAT, "attempt": self.attempt.number, "nonce": self.attempt.nonce}
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
        shards = len(matrices[0].row_bounds) - 1
        replicas = self._ranks // shards
        replica, shard = divmod(self._rank, shards)
        folder = self.attempt.run_dir / CHECKPOINTS
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
                    raise {"Superseded": Superseded, "UserError": UserError}.get(kind, OSError)(text)
            return [result for result, _ in reports]

        def make_folder() -> str:
            if not self._is_main:
                return ""
            self.attempt.check_current()
            files.real_folder(folder)
            return tempfile.mkdtemp(prefix=f".step-{manifest['step']:08d}-", dir=folder)  # mode 0700

        temporary = Path(agreed(make_folder)[0])
        try:
            name = f"shard-{shard:05d}-of-{shards:05d}.safetensors"

            def write_shard() -> dict[str, Any]:
                _check_finite(state)
                entry: dict[str, Any] = {"shard": shard}
                if replicas > 1:
                    entry["state"] = safetensors_io.digest_of(sorted(state.items()))
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
                if not self._is_main:
                    return ""
                manifest["files"] = {
                    entry["name"]: {key: entry[key] for key in ("shard", "bytes", "sha256")}
                    for entry in sorted(entries, key=lambda entry: entry["shard"])
                    if "name" in entry
                }
                manifest["row_bounds"] = {str(m.param.shape[0]): list(m.row_bounds) for m in matrices}
                manifest["parameters"] = _parameters(matrices, counts, state)
                return self._commit(temporary, manifest)

            committed = agreed(commit)[0]
        except BaseException:
            if self._is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._verified.add(committed)
        saved = Saved(committed, sum(entry.get("bytes", 0) for entry in entries), time.perf_counter() - started)
        if self._is_main:
            fields = {"bytes": saved.bytes, "seconds": round(saved.seconds, 3)}
            self.attempt.note(
                "commit", step=manifest["step"], folder=committed, sha256=self._steps[committed], **fields
            )
            self._remove_old()
        return saved

    def _commit(self, temporary: Path, manifest: dict[str, Any]) -> str:
        """Make a written folder visible under its name."""
        manifest["sha256"] = checkpoint.manifest_digest(manifest)
        with (temporary / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(manifest, file, sort_keys=True, indent=1)
            file.flush()
            os.fsync(file.fileno())
        files.sync_folder(temporary)
        target = temporary.with_name(f"step-{manifest['step']:08d}")
        self.attempt.check_current()
        if target.is_symlink() or target.exists():  # of an attempt that is not believed
            checkpoint.set_aside_as(target)
        temporary.rename(target)
        files.sync_folder(target.parent)
        self._steps[target.name] = manifest["sha256"]
        return target.name

    def _remove_old(self) -> None:
        """Remove what is older than the newest verified checkpoints, unless it is marked to be kept."""
        kept = sorted(self._verified & set(self._steps), key=step_number)[-self._keep :]
        if len(kept) < self._keep:
            return
        for name in [name for name in self._steps if -1 < step_number(name) < step_number(kept[0])]:
            folder = self.attempt.run_dir / CHECKPOINTS / name
            if (folder / KEEP).exists():
                continue
            with contextlib.suppress(OSError, Superseded):
                self.attempt.check_current()
                self.attempt.note("remove", folder=name)
                del self._steps[name]
                shutil.rmtree(folder.rename(folder.with_name(f".{name}-removed-{self.attempt.number}")))


def _parameters(matrices: Sequence[Matrix], counts: Tensor, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest says of every matrix; ``counts`` is ``[matrices, 2]``, its principal and dropped weights."""
    keys: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition("/")
        keys.setdefault(name, {})[kind] = str(tensor.dtype).removeprefix("torch.")
    return {
        matrix.name: {
            "shape": list(matrix.param.shape),
            "dtype": str(matrix.param.dtype).removeprefix("torch."),
            "principal": principal,
            "dropped": dropped,
            "keys": keys[matrix.name],
        }
        for matrix, (principal, dropped) in zip(matrices, counts.tolist(), strict=True)
    }


def _describe(error: Exception) -> tuple[str, str]:
    return type(error).__name__, files.reason(error) if isinstance(error, OSError) else str(error)


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{key.rpartition('/')[0]} has weights or optimizer state that is not finite: not saved; "
                f"the checkpoints before are whole"
            )


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
        safetensors_io.header(path)
        return {"bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
