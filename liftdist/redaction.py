"""Secrets are kept out of everything that is printed or written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` without secrets: the value of an environment variable that is named like one, or that the config
    asked for by ``${oc.env:NAME}``, is replaced by ``<NAME>``."""
    environment = os.environ if environment is None else environment
    secrets = {n: v for n, v in environment.items() if len(v) >= 4 and (SECRET_NAME.search(n) or n in REFERENCED)}
    secrets = {n: v for n, v in secrets.items() if not HARMLESS_NAME.fullmatch(n)}
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>")
    return text


def redact_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
HARMLESS_NAME = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|HOSTNAME|SLURM_\w+")
REFERENCE = re.compile(r"oc\.env:\s*(\w+)")
REFERENCED: set[str] = set()  # names of the variables that the config asked for
