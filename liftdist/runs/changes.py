"""What has changed between a checkpoint and the command that continues from it, and whether that was allowed.

a change is (kind, text); the kind says what it changes: schema.NOTHING, COURSE or STATE
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import yaml

from liftdist import schema
from liftdist.errors import UserError
from liftdist.options import CONTINUATION_FLAGS
from liftdist.redaction import redact
from liftdist.runs import claims, layout, manifest
from liftdist.runs.manifest import Provenance
from liftdist.schema import COURSE, STATE, Config

SettingChange = tuple[str, str]


def refuse(found: Sequence[SettingChange], allowed: set[str], run_dir: Path) -> None:
    """Raises ``UserError`` for changes of a kind that is not allowed, those of the state first."""
    for flag, (kind, _) in reversed(CONTINUATION_FLAGS.items()):
        refused = [redact(text) for found_kind, text in found if found_kind == kind]
        if refused and kind not in allowed:
            raise UserError(
                f"run_dir {run_dir}: made with other settings: {'; '.join(refused)}; {flag} goes on with them, "
                f"--fresh starts again in a new directory, and command.txt holds the earlier command"
            )


def provenance(config: Config, text: str, base: str, data: str) -> Provenance:
    """Where the state of a run comes from.

    Args:
        text: the config, as :func:`liftdist.config.load` gives it.
        base: digest of the base model.
        data: digest of the training samples.
    """
    return Provenance(text, _fingerprints(config, text), base, data)


def check_alike(mine: Provenance, first: Provenance, rank: int) -> None:
    """Raises ``UserError`` if this rank starts from something else than rank 0 does: it would decide otherwise."""
    names = {"config": "settings", "from_environment": "environment", "base": "model weights", "data": "training data"}
    if different := [name for key, name in names.items() if getattr(mine, key) != getattr(first, key)]:
        raise UserError(f"rank {rank} on {platform.node()} has other {' and '.join(different)} than rank 0")


def between(before: Provenance, after: Provenance) -> list[SettingChange]:
    """The changes from one state to another."""
    found = of_settings(before.config, after.config)
    kinds = _kinds()
    for key, value in after.from_environment.items():
        if before.from_environment.get(key, value) != value:
            found.append((kinds[schema.template(key)], f"{key}: another value from the environment"))
    if before.base != after.base:
        found.append((STATE, f"model.path: other weights ({before.base[:12]} -> {after.base[:12]})"))
    if before.data != after.data and not any(text.startswith("data.") for _, text in found):
        found.append((COURSE, "data.path: other contents of the same name"))
    return found


def of_settings(before: str, after: str) -> list[SettingChange]:
    """Every setting that differs between two configs, as :func:`liftdist.config.load` gives their text."""
    old, new = (dict(schema.leaves(yaml.safe_load(text))) for text in (before, after))
    kinds = _kinds()
    entries = {
        key.rpartition(".N.")[0] + "." for key in kinds if ".N." in key
    }  # of lists of sections: they may come and go
    found = []
    for key in dict.fromkeys([*old, *new]):
        kind = kinds.get(schema.template(key))
        everywhere = key in old and key in new  # a setting that only one version knows is no change
        listed = schema.template(key).startswith(tuple(entries))
        if kind is not None and (everywhere or listed) and old.get(key) != new.get(key):
            found.append((kind, f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"))
    return found


def check_settings(config: Config, text: str, allowed: set[str]) -> None:
    """Compare the settings with those of the run's newest checkpoint, before anything is started.

    Raises:
        UserError: some have changed, and that was not allowed.
    """
    run_dir = Path(config.run_dir).expanduser()
    commits = [event for events in claims.attempts(run_dir).values() for event in events if event["event"] == "commit"]
    if not commits:
        return
    try:
        kept = manifest.read(run_dir / layout.CHECKPOINTS / commits[-1]["folder"] / layout.MANIFEST)
        found = of_settings(kept.provenance.config, text)
    except (OSError, ValueError, KeyError):
        return  # what is damaged is said when it is read
    refuse(found, allowed, run_dir)


def _kinds() -> dict[str, str]:
    return {key: leaf.metadata["changes"] for key, leaf in schema.settings()}


def _fingerprints(config: Config, text: str) -> dict[str, str]:
    """For every setting that the environment gives, a short hash of its value, which tells whether it has changed."""
    values = dict(schema.leaves(dataclasses.asdict(config)))
    written = dict(schema.leaves(yaml.safe_load(text)))
    return {
        key: hashlib.sha256(repr(value).encode()).hexdigest()[:8]
        for key, value in values.items()
        if "${" in repr(written.get(key))
    }
