"""Where a model is: a local folder, or a name on the hub that is fetched into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from liftdist.errors import UserError

HUB_DUPLICATES = ["consolidated*", "*/*"]  # the same weights in another layout
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(path: str, weights: bool = True) -> Path:
    """The local folder of a model, fetched from the hub (into its cache) if ``path`` is a hub name.

    Raises:
        UserError: no such folder or hub model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(
            f"model.path {path}: " + ("is a file, name its folder" if folder.exists() else "no such folder")
        )
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES if weights else [p for p in HUB_FILES if "safetensors" not in p]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=HUB_DUPLICATES))
    except Exception as error:  # the library raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.path {path}: no such folder, and not to be had from the hub: {reason}") from None
