"""Locating a model: a local folder, or a hub name that is downloaded into the hub's cache."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from liftdist.errors import UserError

HUB_DUPLICATES = ["consolidated*", "*/*"]  # the same weights in another layout
CONFIG_FILES = ["config.json", "*.py"]
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
REPLY_TIMEOUT = 5.0  # seconds within which the hub must answer a request, unless HF_HUB_ETAG_TIMEOUT is set


def resolve_model(path: str, weights: bool = True) -> Path:
    """The local folder of a model, downloaded into the hub's cache if ``path`` is a hub name.

    If the hub does not answer within ``REPLY_TIMEOUT`` seconds, the cached files are used.

    Raises:
        UserError: no such folder or hub model, or the hub cannot be reached and the model is not cached.
    """
    return _resolve(path, HUB_FILES if weights else [p for p in HUB_FILES if "safetensors" not in p])


def resolve_config(path: str) -> Path:
    """Like :func:`resolve_model`, but for ``config.json`` and code files only."""
    return _resolve(path, CONFIG_FILES)


def _resolve(path: str, patterns: Sequence[str]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(
            f"model.path {path}: " + ("is a file; name its folder" if folder.exists() else "no such folder")
        )
    from huggingface_hub import snapshot_download

    unreachable = _why_unreachable()
    try:
        return Path(
            snapshot_download(
                path,
                allow_patterns=list(patterns),
                ignore_patterns=HUB_DUPLICATES,
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # the library raises errors of many kinds
        if unreachable is not None:
            raise UserError(
                f"model.path {path}: the hub cannot be reached ({unreachable}); give a local folder, or fetch it where "
                "there is a network: liftdist select CONFIG --prefetch"
            ) from None
        raise UserError(
            f"model.path {path}: no such folder, and the hub does not provide it: {_first_line(error)}"
        ) from None


@functools.cache  # one request per process
def _why_unreachable() -> str | None:
    """Why the hub cannot be reached; None if it answers a request, with any status.

    Asked first because the library repeats each failed request for over a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else REPLY_TIMEOUT
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]  # without credentials
    answers: list[str | None] = []

    def ask() -> None:
        try:  # the library's client respects the settings for proxies and certificates
            get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=False)
            answers.append(None)
        except Exception as error:
            answers.append(f"{host}: {_first_line(error)}")

    # the client's timeout covers neither name resolution nor the number of addresses that it tries in turn
    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"{host}: no answer within {seconds:g} s"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
