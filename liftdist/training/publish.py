"""Versions of a run's weights, published by its ranks while they train, without a checkpoint.

rows of every rank of the first replica -> rank 0 -> the next version        training waits meanwhile
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from liftdist import files
from liftdist.deltas import of_run
from liftdist.distributed.collectives import gather, together
from liftdist.distributed.mesh import Mesh
from liftdist.errors import UserError
from liftdist.methods.base import Method
from liftdist.models.weights import ModelFolder
from liftdist.runs.checkpoint import touched_of
from liftdist.runs.manifest import Snapshot
from liftdist.schema import SyncConfig
from liftdist.sync import checkpoints
from liftdist.sync.state import Weights
from liftdist.sync.version import Version
from liftdist.sync.writer import Writer


class Publisher:
    """Publishes versions in ``sync.to``. Collective.

    Args:
        snapshot: the state without its tensors, for the names of tensors in the base model's files.

    Raises:
        UserError: as :class:`liftdist.sync.writer.Writer`.
    """

    def __init__(
        self,
        settings: SyncConfig,
        run_dir: Path,
        base: Path,
        mesh: Mesh,
        method: Method,
        snapshot: Callable[[], Snapshot],
    ) -> None:
        assert settings.to is not None
        self.interval = settings.interval
        self.last_step = 0  # that was published
        self._mesh, self._method, self._snapshot = mesh, method, snapshot
        self._writer: Writer | None = None
        with together():
            if mesh.is_main:
                self._model = ModelFolder(base)
                self._writer = checkpoints.writer_of(
                    run_dir,
                    snapshot().provenance,
                    self._model,
                    Path(settings.to).expanduser(),
                    settings.keep,
                    settings.full_interval,
                )

    def publish(self, step: int) -> tuple[str, dict[str, float]]:
        """Publish the current weights. Collective.

        Returns:
            What there is to say of it, and metrics by tag; without any, that it failed: the next version makes up for it.
        """
        began = time.perf_counter()
        parts = self._gathered()
        said: str | None = None
        version: Version | None = None
        with together():
            if self._writer is not None:
                try:
                    version = self._writer.publish(step, self._state(parts))
                    said = checkpoints.described(version, time.perf_counter() - began)
                except (UserError, OSError) as error:
                    said = files.reason(error) if isinstance(error, OSError) else str(error)
        text, size = gather((said, version and sum(file.bytes for file in version.files.values())))[0]
        self.last_step = self.last_step if size is None else step
        seconds = time.perf_counter() - began
        return text, {} if size is None else {"sync/seconds": seconds, "sync/mb": size / 1e6}

    def _gathered(self) -> list[dict[str, Tensor]]:
        """What each shard holds, on rank 0; empty elsewhere."""
        shards, rank = self._mesh.device_mesh.size(1), self._mesh.rank
        mine = None
        if rank < shards:  # of the first replica; of views a copy, as they would be sent with all that they view
            mine = {name: part.clone() for name, part in self._method.weights().items()}
        found: list[dict[str, Tensor] | None] | None = [None] * self._mesh.world_size if self._mesh.is_main else None
        dist.gather_object(mine, found, dst=0)
        return [part for part in found or () if part is not None]

    def _state(self, parts: list[dict[str, Tensor]]) -> dict[str, Weights]:
        snapshot = self._snapshot()
        matrices = {matrix.name: matrix for matrix in self._method.matrices}

        def touched(name: str) -> tuple[Tensor, Tensor]:
            held = ({key.removeprefix(f"{name}/"): part[key] for key in of[name]} for part in parts)
            return touched_of(held, matrices[name].dtype)

        of: dict[str, list[str]] = {}  # keys of each matrix
        for key in parts[0]:
            of.setdefault(key.rpartition("/")[0], []).append(key)
        found = {}
        for stored, names in of_run.by_tensor(snapshot.names, snapshot.copies).items():
            indices, values = of_run.in_tensor(names, touched, snapshot, lambda name: matrices[name].shape[1])
            found[stored] = checkpoints.weights_of(self._model, stored, indices, values)
        return found

    def close(self) -> None:
        """Let another process publish."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
