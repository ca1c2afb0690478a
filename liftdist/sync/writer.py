"""Publishing versions: one writer for a folder, whole versions or none, and only as many as are needed kept."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from liftdist import files
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Delta, is_finite
from liftdist.errors import UserError
from liftdist.processes import this_process
from liftdist.runs.checkpoint import sha256_of
from liftdist.sync import state as states
from liftdist.sync import version as versions
from liftdist.sync.reader import Follower
from liftdist.sync.state import State, Weights
from liftdist.sync.version import CHANGES, FULL, LOCK, Stored, Version

KEEP_FULL = 2  # full deltas: the newest, and the one before it, which a reader may be at
_UNLOCKABLE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks


@dataclass(frozen=True)
class Stream:
    """What all versions of a folder are of."""

    id: str  # of the run, equal in all of its attempts
    run: str  # name of its directory
    base: str  # digest of the base model
    origin: Mapping[str, str]  # base_model and base_commit, if it is of the hub


class Writer:
    """The one process that publishes versions in a folder, until it is closed.

    It goes on where an earlier one ended, killed or not. On file systems without locks two writers are not kept apart at
    once, but a number is published once alone: the second one to publish it fails.

    Args:
        base: the base model's values ``[k]`` of a tensor at flat indices ``[k]`` int64.
        keep: newest versions to keep; more where a reader needs them to get from the newest full delta to the newest.
        full_interval: a full delta is written with every such version.

    Raises:
        UserError: another process publishes there, it holds something else, versions of another run or base model, or versions
            that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        stream: Stream,
        base: Callable[[str, Tensor], Tensor],
        keep: int = 10,
        full_interval: int = 1,
    ) -> None:
        self.folder, self._stream, self._base = folder, stream, base
        self._keep, self._full_interval = keep, full_interval
        with files.disk_errors(folder):
            versions.check_folder(folder, stream.id)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
        try:
            follower = self._follow()
        except BaseException:
            self.close()
            raise
        self.version, self.state = follower.version, follower.state

    def _follow(self) -> Follower:
        """The newest version that earlier writers have left."""
        for left_over in self.folder.glob(".version-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        follower = Follower(self.folder)
        follower.update()
        if (found := follower.version) is None:
            return follower
        if found.number != versions.numbers(self.folder)[-1]:
            raise UserError(f"{follower.problems[0]}; give a new folder, or move that version elsewhere")
        if found.base != self._stream.base:
            raise UserError(f"{self.folder}: holds versions of another base model ({found.run}); give a new folder")
        return follower

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process publish."""
        os.close(self._lock)

    def publish(self, step: int, found: State, source: str = "") -> Version:
        """Publish what a run has changed of its base model up to ``step`` as the next version, and remove old ones.

        Args:
            source: sha256 of the checkpoint that it was made from, if it was.

        Raises:
            UserError: a value is not finite, the disk is full, or another writer has published this version. Nothing is published
                then, and the next version is one to the same state as before.
        """
        for name, held in found.items():
            if not is_finite(held.values):
                raise UserError(f"{self.folder}: step {step} is not published: {name} holds a value that is not finite")
        found = {name: held for name, held in found.items() if held.values.numel()}  # files hold no empty ones
        after = states.grown(self.state, found, self._base)
        number = self.version.number + 1 if self.version else 1
        target = versions.path_of(self.folder, number)
        with files.disk_errors(target), _published(target) as folder:
            if self.version is not None:
                states.write_changes(self.state, after, folder / CHANGES)
            if number % self._full_interval == 0 or not self._with_full():
                self._write_full(after, step, folder / FULL)
            written = {path.name: Stored(path.stat().st_size, sha256_of(path)) for path in sorted(folder.iterdir())}
            previous = self.version.sha256 if self.version else ""
            stream = self._stream
            version = Version(
                number,
                step,
                stream.run,
                stream.id,
                source,
                stream.base,
                dict(stream.origin),
                previous,
                states.digest(after),
                written,
            ).write(folder)
        self.version, self.state = version, after
        self._remove_old()
        return version

    def _write_full(self, state: Mapping[str, Weights], step: int, path: Path) -> None:
        made = {"run": self._stream.run, "step": step}
        delta = Delta(
            path, self._stream.base, sorted(state), lambda name: state[name].change(), self._stream.origin, made=made
        )
        delta_file.write(delta, path, with_base=False)

    def _with_full(self) -> list[int]:
        found = versions.numbers(self.folder)
        return [number for number in found if (versions.path_of(self.folder, number) / FULL).exists()]

    def _remove_old(self) -> None:
        """Remove full deltas before the newest ones, and versions that nobody needs."""
        found, with_full = versions.numbers(self.folder), self._with_full()
        with contextlib.suppress(OSError):  # the next version tries again
            for number in with_full[:-KEEP_FULL]:
                (versions.path_of(self.folder, number) / FULL).unlink()
            for number in found:
                if number <= found[-1] - self._keep and number < with_full[-1]:
                    old = versions.path_of(self.folder, number)
                    shutil.rmtree(old.rename(files.name_beside(old)))


def _locked(folder: Path) -> int:
    """The open lock of a folder. Raises ``UserError`` if another process holds it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace")
        os.close(descriptor)
        with contextlib.suppress(ValueError, KeyError):
            process = json.loads(holder)
            holder = f"process {process['pid']} on {process['host']}"
        raise UserError(
            f"{folder}: {holder or 'another process'} publishes there; stop it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in _UNLOCKABLE:
            os.close(descriptor)
            raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
    return descriptor


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder to fill, which appears as ``target``. Raises ``UserError`` if another process was first."""
    try:
        with files.new_folder(target) as folder:
            yield folder
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{target}: another process has published it; let one alone publish there") from None
        raise
