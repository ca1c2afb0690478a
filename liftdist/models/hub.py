"""Locating a model: a local folder, or a hub name that is downloaded into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from liftdist import hub
from liftdist.errors import UserError
from liftdist.hub import Repository

HUB_DUPLICATES = ["consolidated*", "*/*"]  # the same weights in another layout
CONFIG_FILES = ["config.json", "*.py"]
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a model, downloaded into the hub's cache if ``path`` is a hub name.

    If the hub does not answer within ``hub.REPLY_TIMEOUT`` seconds, the cached files are used.

    Args:
        revision: commit, tag or branch of a hub name.

    Raises:
        UserError: no such folder or hub model or revision, no access, or the hub cannot be reached and the model is not cached.
    """
    return _resolve(path, revision, HUB_FILES if weights else [p for p in HUB_FILES if "safetensors" not in p])


def model_of(text: str, setting: str) -> tuple[Path, Repository | None]:
    """The folder of a model that is given as ``FOLDER`` or, on the hub, ``NAME[@REVISION]``; its repository, if it is there.

    Args:
        setting: what gives it, for messages.

    Raises:
        UserError: as :func:`resolve_model`.
    """
    folder = Path(text).expanduser()
    name, _, revision = text.partition("@")
    repo = None if folder.is_dir() else repository(name, revision or None, setting)
    return (folder if repo is None else _fetch(repo, HUB_FILES)), repo


def file_of(text: str, file: str, setting: str) -> Path:
    """The path of a file that is given as such or, on the hub, by the ``NAME[@REVISION]`` of the repository that holds ``file``.

    Raises:
        UserError: as :func:`resolve_model`, or the repository holds no such file. A path may be of nothing.
    """
    path = Path(text).expanduser()
    name, _, revision = text.partition("@")
    if path.exists() or not re.fullmatch(hub.FULL_NAME, name):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repo = Repository(setting, hub.MODEL, name, revision or None, local="file")
    with repo.reading() as (commit, offline):
        try:
            return Path(hf_hub_download(name, file, revision=commit, local_files_only=offline))
        except RemoteEntryNotFoundError:
            raise UserError(f"{repo}: the repository holds no {file}") from None


def cached_model(name: str, commit: str) -> Path:
    """The folder of a model in the hub's cache. Raises ``UserError`` if it is not there; uses no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=commit, local_files_only=True))
    except LocalEntryNotFoundError:
        raise UserError(f"{name}: commit {commit} is not in the hub's cache") from None


def resolve_config(path: str, revision: str | None = None) -> Path:
    """Like :func:`resolve_model`, but for ``config.json`` and code files only."""
    return _resolve(path, revision, CONFIG_FILES)


def repository(path: str, revision: str | None = None, setting: str = "model.path") -> Repository | None:
    """The repository that ``path`` names; None if it is a local folder. Raises ``UserError`` if it can be neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision={revision}: model.path {path} is a local folder, which has no revisions; leave it out"
            )
        return None
    if path.startswith((".", "/", "~")) or not re.fullmatch(hub.NAME, path):
        raise UserError(f"{setting} {path}: " + ("is a file; name its folder" if folder.exists() else "no such folder"))
    return Repository(setting, hub.MODEL, path, revision)


def _resolve(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    repo = repository(path, revision)
    return Path(path).expanduser() if repo is None else _fetch(repo, patterns)


def _fetch(repo: Repository, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    with repo.reading() as (commit, offline):
        folder = Path(
            snapshot_download(
                repo.name,
                revision=commit,
                allow_patterns=list(patterns),
                ignore_patterns=HUB_DUPLICATES,
                local_files_only=offline,
            )
        )
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        raise UserError(
            f"{repo}: the repository holds "
            + ("an adapter; name its base model" if adapter else "no config.json, so no model that transformers loads")
        )
    if patterns is HUB_FILES and not any(folder.glob("*.safetensors")):
        raise UserError(f"{repo}: the repository holds no weights in safetensors; convert them, or name another model")
    return folder
