"""What is kept at the newest version of a run, on a disk, for servers that load or reload weights from there.

hf        a model folder, replaced in one step: at any moment it is one whole version
sglang    a folder of SGLang's own versions, one for each version that was read, see liftdist/deltas/formats/sglang.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liftdist import files
from liftdist.deltas.delta import ABOUT, Change, Delta
from liftdist.deltas.formats import hf, sglang
from liftdist.errors import UserError
from liftdist.models import check, weights
from liftdist.models.weights import ModelFolder
from liftdist.sync import version as versions
from liftdist.sync.reader import Follower, Unreachable
from liftdist.sync.version import Version

_POLL = 1.0  # seconds between two looks


def follow(
    source: Path,
    base: Path,
    target: Path,
    form: str,
    cache_dir: Path,
    once: bool,
    say: Callable[[str], None],
    poll: float = _POLL,
) -> None:
    """Write the newest version of a folder of versions as ``form``, hf or sglang, and each newer one.

    A version that cannot be read yet is reported, and tried again.

    Raises:
        UserError: ``target`` is something else, cannot be written or replaced; with ``once``, no version can be read; ``base`` is
            not the base model, or one that the form is not for.
    """
    # the target may be the current folder, which is replaced
    source, base, cache_dir = source.absolute(), base.absolute(), cache_dir.absolute()
    given, target = target, target.resolve()
    if form == "sglang":
        sglang.check_base(ModelFolder(base))
    digest = weights.digest(base, cache_dir)
    held = _held(target, form, digest)
    if form == "hf":
        files.remove_left_over(target)
    follower = Follower(source, digest)
    said = ""
    while True:
        try:
            changes = follower.update()
        except Unreachable as error:
            if once:
                raise
            if str(error) != said:
                said = str(error)
                say(f"liftdist: {said}")
        else:
            for problem in follower.problems if changes is not None else ():
                say(f"liftdist: {problem}")
            if changes is not None and follower.version is not None:
                said = ""
                if held != _made(follower.version):
                    if form == "sglang" and held:
                        _check_continues(source, held, follower.version, target)
                    if weights.digest(base, cache_dir) != digest:
                        raise UserError(f"{base}: is another model than when this began; start again")
                    _write(form, follower, follower.version, changes, base, target)
                    held = _made(follower.version)
                say(f"{given}: version {follower.version.number}, step {follower.version.step}")
            if once:
                if follower.version is None:
                    raise UserError(f"{source}: holds no version yet; liftdist sync RUN --to {source} writes them")
                return
        time.sleep(poll)


def _write(
    form: str, follower: Follower, version: Version, changes: Mapping[str, Change], base: Path, target: Path
) -> None:
    def delta(of: Mapping[str, Any], get: Callable[[str], Change]) -> Delta:
        return Delta(follower.folder, version.base, sorted(of), get, version.origin, made=_made(version))

    everything = delta(follower.state, lambda name: follower.state[name].change())
    if form == "hf":
        with files.locked(target) if target.exists() else contextlib.nullcontext():
            hf.write(everything, base, target, replace=target.exists())
    else:
        target.mkdir(exist_ok=True)
        sglang.add(target, ModelFolder(base), everything, delta(changes, lambda name: changes[name]))


def _made(version: Version) -> dict[str, Any]:
    return {
        "run": version.run,
        "step": version.step,
        "stream": version.stream,
        "version": version.number,
        "sync": version.sha256,
    }


def _check_continues(source: Path, held: Mapping[str, Any], version: Version, target: Path) -> None:
    """Raises ``UserError`` unless ``version`` comes after the one that is held: what that one had changed, this one changes too.

    Weights that only another run has changed would stay as that one left them, without a checksum that tells.
    """
    is_later = held["stream"] == version.stream and held["version"] < version.number
    if is_later and held["version"] in versions.numbers(source):
        with contextlib.suppress(ValueError, OSError):  # damaged, or removed now
            is_later = versions.read(versions.path_of(source, held["version"])).sha256 == held["sync"]
    if not is_later:
        raise UserError(
            f"{target}: holds version {held['version']} of {held['run']}, which version {version.number} of {version.run} in "
            f"{source} does not follow; give another --output, and load the base model again"
        )


def _held(target: Path, form: str, base: str) -> dict[str, Any]:
    """What an earlier process has written says of itself. Raises ``UserError`` if ``target`` is something else."""
    if not target.exists() or (form == "sglang" and target.is_dir() and not any(target.iterdir())):
        return {}
    newest = target if form == "hf" or not target.is_dir() else sglang.path_of(target, sglang.newest(target))
    about = check.read_json(newest / ABOUT) if (newest / ABOUT).exists() else {}
    made: dict[str, Any] = about.get("made", {})
    if not {"sync", "stream", "version", "run"} <= made.keys() or about.get("base_digest") != base:
        raise UserError(f"{target}: exists, and is no folder that this command has written; give another --output")
    return made
