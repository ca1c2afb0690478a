"""Where a model is: a local folder, or a name on the hub that is fetched into its cache."""

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
PATIENCE = 5.0  # seconds for the hub to answer at all, unless HF_HUB_ETAG_TIMEOUT gives another number


def resolve_model(path: str, weights: bool = True) -> Path:
    """The local folder of a model, fetched from the hub (into its cache) if ``path`` is a hub name.

    Where the hub cannot be reached within ``PATIENCE`` seconds, what its cache holds is used.

    Raises:
        UserError: no such folder or hub model; or the hub cannot be reached, and its cache does not hold the model.
    """
    return _resolve(path, HUB_FILES if weights else [p for p in HUB_FILES if "safetensors" not in p])


def resolve_config(path: str) -> Path:
    """:func:`resolve_model` for ``config.json`` alone, and the code that a model may come with."""
    return _resolve(path, CONFIG_FILES)


def _resolve(path: str, patterns: Sequence[str]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(
            f"model.path {path}: " + ("is a file, name its folder" if folder.exists() else "no such folder")
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
    except Exception as error:  # the library raises almost anything
        if unreachable is not None:
            raise UserError(
                f"model.path {path}: the hub cannot be reached ({unreachable}); give a local folder, or fetch it where "
                "there is a network: liftdist select CONFIG --prefetch"
            ) from None
        raise UserError(
            f"model.path {path}: no such folder, and not to be had from the hub: {_first_line(error)}"
        ) from None


@functools.cache  # one process asks once, however often it looks for the model
def _why_unreachable() -> str | None:
    """Why nothing can be fetched from the hub now; None if it answers one request, whatever the answer.

    The library itself repeats each request for over a minute before it gives up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    seconds = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]  # without a password
    answers: list[str | None] = []

    def ask() -> None:
        try:  # by the library's own client, which knows proxies and certificates
            get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=False)
            answers.append(None)
        except Exception as error:
            answers.append(f"{host}: {_first_line(error)}")

    # the client bounds neither the lookup of a name nor the addresses it tries one after the other
    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else f"{host}: no answer within {seconds:g} s"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
