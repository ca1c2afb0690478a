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


def resolve_config(path: str, revision: str | None = None) -> Path:
    """Like :func:`resolve_model`, but for ``config.json`` and code files only."""
    return _resolve(path, revision, CONFIG_FILES)


def repository(path: str, revision: str | None = None) -> Repository | None:
    """The repository that ``path`` names; None if it is a local folder. Raises ``UserError`` if it can be neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision={revision}: model.path {path} is a local folder, which has no revisions; leave it out"
            )
        return None
    if path.startswith((".", "/", "~")) or not re.fullmatch(hub.NAME, path):
        raise UserError(
            f"model.path {path}: " + ("is a file; name its folder" if folder.exists() else "no such folder")
        )
    return Repository("model.path", hub.MODEL, path, revision)


def _resolve(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    repo = repository(path, revision)
    if repo is None:
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    commit, unreachable = repo.commit(), hub.why_unreachable()
    try:
        folder = Path(
            snapshot_download(
                path,
                revision=commit or revision,
                allow_patterns=list(patterns),
                ignore_patterns=HUB_DUPLICATES,
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # the library raises errors of many kinds
        if unreachable is not None:
            raise repo.unreachable(unreachable) from None
        raise repo.error(error) from None
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        raise UserError(
            f"{repo}: the repository holds "
            + ("an adapter; name its base model" if adapter else "no config.json, so no model that transformers loads")
        )
    if patterns is HUB_FILES and not any(folder.glob("*.safetensors")):
        raise UserError(f"{repo}: the repository holds no weights in safetensors; convert them, or name another model")
    return folder
