"""Following a folder of versions: what has changed since the last look, checked before it is handed out.

    from version 5 to 8:    changes of 6, 7, 8     or    the newest full delta after 5, then the changes after it

The fewest bytes are tried first; a version that is missing or damaged, or that was removed before it could be read, leaves the
other ways. What is handed out has the digest that the writer's state had, so a reader that writes it into the base model's
weights holds the writer's, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, bits
from liftdist.errors import UserError
from liftdist.runs.checkpoint import sha256_of
from liftdist.sync import state as states
from liftdist.sync import version as versions
from liftdist.sync.state import Support, Weights
from liftdist.sync.version import CHANGES, FULL, Version

_TRIES = 3  # looks at a folder whose versions may be removed meanwhile


class Unreachable(UserError):
    """No newer version can be read now; what the reader holds stays as it is, and a later look may succeed."""


class Follower:
    """What a folder of versions holds, as far as this process has followed it.

    Args:
        base: digest of the base model that the reader holds, see :func:`liftdist.models.weights.digest`; None leaves it
            unchecked.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        self.folder, self._base = folder, base
        self.version: Version | None = None  # the newest that was handed out
        self.state: dict[str, Weights] = {}
        self.problems: list[str] = []  # what the last update found missing or damaged

    def update(self) -> dict[str, Change] | None:
        """What has changed since the last update: new values by flat index, for tensors by their name in the base model's files.

        None if there is no newer version. From the base model to the first update, and from each update to the next, these values
        turn the weights into those of :attr:`version`.

        Raises:
            Unreachable: there are newer versions, and none can be read. Nothing has changed then.
            UserError: the folder is missing, or holds versions of another run or base model.
        """
        for _ in range(_TRIES):
            self.problems = []
            found = versions.numbers(self.folder)
            self._check_same(found)
            newer = [number for number in found if number > self._number]
            if not newer:
                return None
            for target in reversed(newer):
                if (reached := self._reach(newer, target)) is not None:
                    return self._accept(*reached)
        problem = self.problems[0] if self.problems else "no full delta is left"
        at = f"; version {self._number} is kept" if self._number else ""
        raise Unreachable(f"{self.folder}: no newer version can be read yet: {problem}{at}")

    @property
    def _number(self) -> int:
        return self.version.number if self.version else 0

    def _check_same(self, found: list[int]) -> None:
        """Raises ``UserError`` if the folder is not the one that was followed."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; liftdist sync RUN --to {self.folder} writes it")
        if self.version is None:
            return
        try:
            is_same = self._number not in found or self._read(self._number).sha256 == self.version.sha256
        except UserError:
            raise  # of another run or base model
        except (ValueError, OSError):
            is_same = True  # removed now, or damaged since
        if not is_same or max(found, default=0) < self._number:
            raise UserError(
                f"{self.folder}: holds other versions than those followed so far; load the base model again and follow anew"
            )

    def _read(self, number: int) -> Version:
        version = versions.read(versions.path_of(self.folder, number))
        if self._base is not None and version.base != self._base:
            raise UserError(
                f"{self.folder}: is of another base model (digest {version.base[:12]}, not {self._base[:12]}); give that one"
            )
        if self.version is not None and version.stream != self.version.stream:
            raise UserError(
                f"{self.folder}: holds versions of run {version.run} now, not of {self.version.run}; "
                "load the base model again and follow anew"
            )
        return version

    def _reach(self, newer: list[int], target: int) -> tuple[Version, dict[str, Weights]] | None:
        """Version ``target`` and its state, by the way of fewest bytes that works."""
        manifests: dict[int, Version] = {}
        for number in newer:
            if number <= target:
                try:
                    manifests[number] = self._read(number)
                except UserError:
                    raise  # of another run or base model
                except (ValueError, OSError) as error:
                    self.problems.append(str(error))
        ways: list[tuple[int, int | None]] = []  # bytes, and the full delta that it begins with
        for begin in (None, *manifests):
            after = range((self._number if begin is None else begin) + 1, target + 1)
            if self.version is None if begin is None else not (versions.path_of(self.folder, begin) / FULL).exists():
                continue
            if all(number in manifests and CHANGES in manifests[number].files for number in after):
                size = sum(manifests[number].files[CHANGES].bytes for number in after)
                ways.append((size + (manifests[begin].files[FULL].bytes if begin else 0), begin))
        for _, begin in sorted(ways, key=lambda way: way[0]):
            try:
                return manifests[target], self._walk(begin, target, manifests)
            except (ValueError, KeyError, OSError) as error:
                self.problems.append(str(error))
        return None

    def _walk(self, begin: int | None, target: int, manifests: Mapping[int, Version]) -> dict[str, Weights]:
        """The state of version ``target``. Raises ``ValueError``, ``KeyError`` or ``OSError`` for what is missing or damaged."""
        if begin is None:
            before, state = self.version, self.state
        else:
            before, state = manifests[begin], self._read_full(manifests[begin])
        assert before is not None
        for number in range(before.number + 1, target + 1):
            version = manifests[number]
            if version.previous != before.sha256:
                raise ValueError(f"version {number} does not follow the version {before.number} that was read")
            state = states.read_changes(state, self._checked(version, CHANGES))
            before = version
        if states.digest(state) != before.state:
            raise ValueError(f"version {target} is not what was written: the digest of its state differs")
        return state

    def _checked(self, version: Version, name: str) -> Path:
        """A file of a version, whose sha256 is right."""
        path = versions.path_of(self.folder, version.number) / name
        if sha256_of(path) != version.files[name].sha256:
            raise ValueError(f"{path} is damaged: its sha256 differs from the manifest")
        return path

    def _read_full(self, version: Version) -> dict[str, Weights]:
        delta = delta_file.read(self._checked(version, FULL))
        read = ((name, delta.get(name)) for name in delta.names)
        return {
            name: Weights(Support.of(c.shape, c.stored, c.indices), c.values)
            for name, c in read
            if isinstance(c, Change)
        }

    def _accept(self, version: Version, state: dict[str, Weights]) -> dict[str, Change]:
        changes = {}
        try:
            if lost := self.state.keys() - state.keys():
                raise ValueError(f"{min(lost)} is not there")
            for name, held in state.items():
                if (places := states.moved(self.state.get(name), held)).numel():
                    changes[name] = held.change(places)
        except ValueError:
            raise UserError(
                f"{self.folder}: version {version.number} has lost weights that version {self._number} had changed; "
                "load the base model again and follow anew"
            ) from None
        self.version, self.state = version, state
        return changes


@torch.no_grad()
def write_into(tensors: Mapping[str, Tensor], changes: Mapping[str, Change]) -> None:
    """Write what :meth:`Follower.update` returned into whole tensors, by their name in the base model's files.

    Raises:
        UserError: a tensor is missing, or has another shape or a dtype that does not hold the values; nothing is written.
    """
    for name, change in changes.items():
        if name not in tensors:
            raise UserError(f"{name}: the model has no such tensor, which the run has changed")
        tensor = tensors[name]
        if tuple(tensor.shape) != change.shape:
            raise UserError(
                f"{name}: is {list(tensor.shape)} in the model, {list(change.shape)} in the run's base model"
            )
        if torch.promote_types(tensor.dtype, change.values.dtype) != tensor.dtype:
            raise UserError(
                f"{name}: {tensor.dtype} does not hold values of {change.values.dtype}; load the model in that"
            )
        if not tensor.is_contiguous():
            raise UserError(f"{name}: is not contiguous in memory; give a contiguous tensor")
    for name, change in changes.items():
        flat = tensors[name].detach().view(-1)
        flat.index_copy_(0, change.indices.to(flat.device), change.values.to(flat))


def check(tensors: Mapping[str, Tensor], follower: Follower) -> None:
    """Raises ``UserError`` unless whole tensors hold what a follower has handed out, to the bit."""
    for name, held in follower.state.items():
        change = held.change()
        flat = tensors[name].detach().reshape(-1)
        if not torch.equal(bits(flat[change.indices.to(flat.device)].cpu()), bits(change.values.to(flat.dtype))):
            number = follower.version.number if follower.version else 0
            raise UserError(f"{name}: does not hold version {number} of {follower.folder}; load the base model again")
