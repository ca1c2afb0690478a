"""Removes secrets from everything that is printed or written.

A secret is the value of an environment variable whose name looks like a secret's, or that the config refers to by
``${oc.env:NAME}``. Short values, common words, numbers and, judged by the variable's name, paths are not secrets: replacing
them would garble other text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

LEAST_LENGTH = 6  # shorter values are not secrets
ANYWHERE_LENGTH = 12  # secrets of this length or more are replaced inside words, too

_SECRET_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|(^|_)(TOKEN|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SECRET_?KEY|CREDENTIALS?|PASS|PAT)(_|$)|(^|_)KEY$",
    re.IGNORECASE,
)
_HARMLESS_NAME = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|HOSTNAME|SLURM_\w+")
_HARMLESS_KIND = re.compile(
    r"_(FILE|PATH|DIR|COUNT|LIMIT|TYPE|NAME|LENGTH)$", re.IGNORECASE
)  # exceptions from _SECRET_NAME
_COMMON_VALUE = re.compile(
    r"[-+.\deE_]+|disabled?|enabled?|default|localhost|unknown|undefined|required|optional|bfloat16|float\d+",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"oc\.env:\s*(\w+)")

_referenced: set[str] = set()  # names of the variables that the config refers to


def note_references(texts: Iterable[str]) -> None:
    """Treat the variables that ``texts`` refer to by ``${oc.env:NAME}`` as secrets from now on."""
    _referenced.update(name for text in texts for name in _REFERENCE.findall(text))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` with each secret replaced by ``<NAME>``, the name of its variable."""
    environment = os.environ if environment is None else environment
    secrets = {name: value for name, value in environment.items() if _is_secret(name, value)}
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if len(value) >= ANYWHERE_LENGTH:
            text = text.replace(value, f"<{name}>")
        elif value in text:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", lambda _, name=name: f"<{name}>", text)  # type: ignore[misc]
    return text


def _is_secret(name: str, value: str) -> bool:
    named_like_one = _SECRET_NAME.search(name) and not _HARMLESS_KIND.search(name)
    if not (name in _referenced or named_like_one) or _HARMLESS_NAME.fullmatch(name):
        return False
    return len(value) >= LEAST_LENGTH and not _COMMON_VALUE.fullmatch(value)


def redact_tree(value: Any) -> Any:
    """A config as nested mappings and lists, with every string redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value
