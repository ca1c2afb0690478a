"""Publishing what a run has learned, from its checkpoints as they appear."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from liftdist.deltas import adapter, of_run
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint, claims
from liftdist.runs.checkpoint import Step
from liftdist.runs.claims import Event
from liftdist.runs.manifest import Provenance
from liftdist.safetensors_io import DTYPES
from liftdist.sync.state import Support, Weights
from liftdist.sync.version import CHANGES, FULL, Version
from liftdist.sync.writer import Stream, Writer

_POLL = 1.0  # seconds between two looks at a run
Say = Callable[[str], None]
Read = TypeVar("Read")


def publish(
    run_dir: Path,
    folder: Path,
    base: Path | None,
    cache_dir: Path,
    keep: int,
    full_interval: int,
    once: bool,
    say: Say,
    poll: float = _POLL,
) -> None:
    """Publish the newest checkpoint of a run as a version, and each newer one, until the run has finished.

    Args:
        base: folder of the base model; by default where the run found it.
        once: publish the newest checkpoint alone.

    Raises:
        UserError: as :class:`liftdist.sync.writer.Writer` and its ``publish``; the base model is another, the run is one of
            adapters, or with ``once`` it has no intact checkpoint. Versions that were published stay; the same command goes
            on.
    """
    source = _Source(run_dir, base, cache_dir, say)
    writer: Writer | None = None
    seen = said = ""

    def tried(make: Callable[[], Read]) -> Read | None:
        """What is read of a checkpoint; None if it is damaged, or removed meanwhile: a newer one may follow."""
        try:
            return make()
        except UserError as error:
            if once:
                raise
            say(str(error))
            return None

    try:
        while True:
            history = claims.attempts(run_dir)
            name, sha256 = _newest(run_dir, history)
            if name is not None and sha256 != seen:
                seen = sha256
                began = time.perf_counter()
                if (step := tried(partial(source.step, name, sha256))) is None:
                    continue
                writer = writer or source.writer(step, folder, keep, full_interval)
                source.check_same()
                if writer.version is not None and writer.version.source == sha256:
                    continue
                if (state := tried(partial(source.state, step))) is not None:
                    version = writer.publish(step.number, state, sha256)
                    say(described(version, time.perf_counter() - began))
                continue
            phase = _phase(run_dir, history)
            if once or phase == "finished":
                if writer is None or writer.version is None:
                    raise UserError(f"{run_dir}: holds no checkpoint that could be published")
                if writer.version.source != sha256:
                    raise UserError(
                        f"{run_dir}: {name}, the newest checkpoint, could not be published; {folder} holds step "
                        f"{writer.version.step}"
                    )
                say(f"{folder} holds version {writer.version.number}, of step {writer.version.step}")
                return
            if phase != said:
                said = phase
                say(f"{run_dir}: {phase}")
            time.sleep(poll)
    finally:
        if writer is not None:
            writer.close()


def _newest(run_dir: Path, history: dict[int, list[Event]]) -> tuple[str | None, str]:
    """Name of the newest checkpoint's folder, and sha256 of its manifest."""
    found = checkpoint.accepted(run_dir, history)
    name = max(found, key=checkpoint.step_number, default=None)
    return name, found[name] if name else ""


def _phase(run_dir: Path, history: dict[int, list[Event]]) -> str:
    """How a run is, for people; "finished" if nothing will follow."""
    if not history:
        return "has not begun; waiting for it, Ctrl-C ends that"
    newest = max(history)
    ends = [event["outcome"] for event in history[newest] if event.get("event") == "end"]
    if ends == ["finished"]:
        return "finished"
    if claims.is_over(claims.path_of(run_dir, newest), history[newest], time.time()):
        return f"{ends[0] if ends else 'died'}; waiting for it to continue, Ctrl-C ends that"
    return "goes on; waiting for its next checkpoint"


def described(version: Version, seconds: float) -> str:
    """A line for people on a version that was published."""
    names = {CHANGES: "changes", FULL: "full"}
    sizes = ", ".join(f"{names[name]} {file.bytes / 1e6:.4g} MB" for name, file in version.files.items())
    return f"version {version.number}: step {version.step}, {sizes}, {seconds:.2f} s"


class _Source:
    """The run, and its base model once there is a checkpoint that names it."""

    def __init__(self, run_dir: Path, base: Path | None, cache_dir: Path, say: Say) -> None:
        self._run_dir, self._given, self._cache_dir, self._say = run_dir, base, cache_dir, say
        self._model: ModelFolder | None = None
        self._identity: str | None = None  # of the run whose versions are published

    def step(self, name: str, sha256: str) -> Step:
        """A checkpoint, verified. Raises ``UserError`` if it is damaged."""
        return of_run.intact(self._run_dir, {name: sha256}, self._say)

    def writer(self, step: Step, folder: Path, keep: int, full_interval: int) -> Writer:
        self._identity = claims.identity(self._run_dir)
        return writer_of(self._run_dir, step.manifest.provenance, self._base(step), folder, keep, full_interval)

    def check_same(self) -> None:
        """Raises ``UserError`` if the run has been begun anew since: its versions would be taken for those of the former one."""
        if claims.identity(self._run_dir) != self._identity:
            raise UserError(f"{self._run_dir}: is another run than when this began; publish it in a new folder")

    def _base(self, step: Step) -> ModelFolder:
        if self._model is None:
            folder = self._given or of_run.base_folder(step)
            if adapter.of_step(step, folder) is not None:
                raise UserError(
                    f"{self._run_dir}: trains adapters, which change all weights of their modules; they are small: "
                    "liftdist export --format peft writes them"
                )
            if weights.digest(folder, self._cache_dir) != step.manifest.provenance.base:
                raise UserError(f"{folder}: is not the base model of {self._run_dir}; --base must name its folder")
            self._model = ModelFolder(folder)
        return self._model

    def state(self, step: Step) -> dict[str, Weights]:
        """What a checkpoint holds of each tensor of the base model's files."""
        model, snapshot = self._base(step), step.manifest.snapshot
        found = {}
        for name, matrices in of_run.matrices_of(step, model).items():
            with of_run.held(step):
                indices, values = of_run.in_tensor(matrices, step.touched, snapshot, step.columns)
            found[name] = weights_of(model, name, indices, values)
        return found


def writer_of(
    run_dir: Path, provenance: Provenance, model: ModelFolder, folder: Path, keep: int, full_interval: int
) -> Writer:
    """What writes the versions of a run of the base model ``model``. Raises ``UserError`` as it."""
    identity = claims.identity(run_dir)
    assert identity is not None  # an attempt has claimed it
    stream = Stream(identity, run_dir.resolve().name, provenance.base, of_run.origin_of(provenance))
    return Writer(folder, stream, partial(read_at, model), keep, full_interval)


def weights_of(model: ModelFolder, name: str, indices: Tensor, values: Tensor) -> Weights:
    """Trained values of a tensor of the base model, in the dtype that holds them and the base's."""
    info = model.info(name)
    stored = DTYPES[info["dtype"]]
    return Weights(
        Support.of(tuple(info["shape"]), stored, indices), values.to(torch.promote_types(stored, values.dtype))
    )


def read_at(model: ModelFolder, name: str, indices: Tensor) -> Tensor:
    """``[k]`` values of a tensor of a model folder at flat indices."""
    return model.read(name).flatten()[indices]
