"""Differences between a checkpoint and the command that continues from it, and whether they are allowed.

change = (kind, text), where kind is the effect of the change: schema_tree.NOTHING, COURSE, STATE or FIXED
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from liftdist import schema_tree
from liftdist.errors import UserError
from liftdist.method_settings import BY_GRADIENTS
from liftdist.options import CONTINUATION_FLAGS
from liftdist.redaction import redact
from liftdist.runs import claims, layout, manifest
from liftdist.runs.manifest import Provenance
from liftdist.schema import Config
from liftdist.schema_tree import COURSE, FIXED, NOTHING, STATE

SettingChange = tuple[str, str]


def refuse(found: Sequence[SettingChange], allowed: set[str], run_dir: Path) -> None:
    """Raises ``UserError`` for changes of a kind that is not allowed; ``STATE`` changes are reported first.

    No flag allows ``FIXED`` ones, such as another method: what one has trained, another cannot continue.
    """
    if fixed := [redact(text) for kind, text in found if kind == FIXED]:
        raise UserError(
            f"run_dir {run_dir}: {'; '.join(fixed)}: cannot be changed; --fresh starts again in a new directory"
        )
    for flag, (kind, _) in reversed(CONTINUATION_FLAGS.items()):
        refused = [redact(text) for found_kind, text in found if found_kind == kind]
        if refused and kind not in allowed:
            raise UserError(
                f"run_dir {run_dir}: started with different settings: {'; '.join(refused)}; {flag} continues with the new "
                f"ones, --fresh starts again in a new directory, and command.txt holds the earlier command"
            )


def provenance(
    config: Config,
    text: str,
    base_digest: str,
    data_digest: str,
    commits: dict[str, str] | None = None,
    contents: dict[str, str] | None = None,
    samples: int = 0,
) -> Provenance:
    """The inputs that the state of a run depends on.

    Args:
        text: YAML text of the config, from :func:`liftdist.config.load`.
        base_digest: digest of the base model's weights.
        data_digest: digest of the training samples.
        commits: ``NAME@COMMIT`` of what is from the hub, by setting.
        contents: digest of the other files that a setting names, by setting.
        samples: number of training samples.
    """
    fingerprints = _fingerprints(config, text)
    return Provenance(text, fingerprints, base_digest, data_digest, commits or {}, contents or {}, samples)


def check_alike(mine: Provenance, first: Provenance, rank: int) -> None:
    """Raises ``UserError`` if this rank's inputs differ from those of rank 0: the ranks would take different decisions."""
    names = {"config": "settings", "from_environment": "environment", "base": "model weights", "data": "training data"}
    names["contents"] = f"contents of files ({', '.join(mine.contents) or 'none'})"
    names["commits"] = f"commits on the hub ({_listed(mine)}, not {_listed(first)})"
    if different := [name for key, name in names.items() if getattr(mine, key) != getattr(first, key)]:
        raise UserError(
            f"rank {rank} on {platform.node()} differs from rank 0 in {' and '.join(different)}; "
            f"use the same on every machine"
        )


def between(before: Provenance, after: Provenance) -> list[SettingChange]:
    """The changes from ``before`` to ``after``."""
    found = of_settings(before.config, after.config)
    if _gathers(after.config):  # of gradients, in micro-batches
        found = [(COURSE if text.startswith("train.micro_batch_size:") else kind, text) for kind, text in found]
    kinds = _kinds()
    for key, value in after.from_environment.items():
        if before.from_environment.get(key, value) != value:
            found.append(
                (kinds[schema_tree.template(key, Config)], f"{key}: its value from the environment has changed")
            )
    for key, digest in after.contents.items():
        if before.contents.get(key, digest) != digest and not any(text.startswith(f"{key}:") for _, text in found):
            found.append((kinds[key], f"{key}: the contents have changed"))
    moved = {key: _moved(before, after, key) for key in after.commits}
    if before.base != after.base:
        digests = f"({before.base[:12]} -> {after.base[:12]})"
        found.append((STATE, f"model.path: the weights have changed {digests}{moved.pop('model.path', '')}"))
    if before.data != after.data:
        of_data = {key: moved.pop(key) for key in [*moved] if _is_of_training(key)}
        if not any(kind == COURSE and text.startswith("data.") for kind, text in found):
            keys = [key for key, text in of_data.items() if text] or [_data_key(after.config)]
            found += [(COURSE, f"{key}: the contents have changed{of_data.get(key, '')}") for key in keys]
    for key, text in moved.items():
        same = "the weights are equal, other files may differ" if key == "model.path" else "of another commit"
        same = "the samples are equal" if _is_of_training(key) else same
        found += [(NOTHING, f"{key}: {same}{text}")] if text else []
    return found


def _gathers(config: str) -> bool:
    """Whether a selection runs batches of data, by the settings of a config, given as YAML text."""
    given = dict(schema_tree.leaves(yaml.safe_load(config)))
    by_data = given.get("selection.criterion") in BY_GRADIENTS or given.get("selection.budget") == "ist"
    return by_data and given.get("method", "lift") == "lift"


def _is_of_training(key: str) -> bool:
    """Whether a setting names training data."""
    return key == "data.path" or key.startswith("data.sources.")


def _data_key(config: str) -> str:
    """The setting that names the training data of a config, given as YAML text."""
    given = dict(schema_tree.leaves(yaml.safe_load(config)))
    return "data.sources" if any(key.startswith("data.sources.") for key in given) else "data.path"


def _moved(before: Provenance, after: Provenance, key: str) -> str:
    """How the commit of a repository differs, and how to use the earlier one; empty if it does not, or is not known."""
    (old_name, _, old), (name, _, new) = (side.commits.get(key, "").rpartition("@") for side in (before, after))
    if not old or old_name != name or old == new:
        return ""
    setting = key.replace("path", "revision")
    return f": the run used commit {old} of {name}, and finds {new} now; {setting}={old} continues with the earlier one"


def _listed(provenance: Provenance) -> str:
    return ", ".join(provenance.commits.values()) or "none known"


def of_settings(before: str, after: str) -> list[SettingChange]:
    """Every setting that differs between two configs, given as YAML text from :func:`liftdist.config.load`."""
    old, new = (dict(schema_tree.leaves(yaml.safe_load(text))) for text in (before, after))
    kinds = _kinds()
    found = []
    for key in dict.fromkeys([*old, *new]):
        kind = kinds.get(schema_tree.template(key, Config))
        in_both = key in old and key in new  # a setting that only one version of liftdist knows is not a change
        form = schema_tree.template(key, Config)
        # entries of lists of sections, and of texts and values by name, may be added or removed
        comes_and_goes = schema_tree.texts(Config).get(form) in (schema_tree.NAMED_TEXTS, schema_tree.NAMED_VALUES)
        if entry := re.match(r".*\.\d+\.", key):
            comes_and_goes |= not all(any(other.startswith(entry[0]) for other in side) for side in (old, new))
        # by their texts: true and 1 are two values
        if kind is not None and (in_both or comes_and_goes) and repr(old.get(key)) != repr(new.get(key)):
            found.append((kind, f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"))
    return found


def check_settings(config: Config, text: str, allowed: set[str]) -> None:
    """Compare the settings with those of the run's newest checkpoint, before ranks start.

    Raises:
        UserError: settings have changed, and the change is not allowed.
    """
    run_dir = Path(config.run_dir).expanduser()
    commits = [event for events in claims.attempts(run_dir).values() for event in events if event["event"] == "commit"]
    if not commits:
        return
    try:
        kept = manifest.read(run_dir / layout.CHECKPOINTS / commits[-1]["folder"] / layout.MANIFEST)
        found = of_settings(kept.provenance.config, text)
    except (OSError, ValueError, KeyError):
        return  # the ranks report a damaged checkpoint when they load it
    refuse(found, allowed, run_dir)


def check_asked(before: Provenance, config: Config, text: str, folder: Path) -> None:
    """Compare the settings that the model of a checkpoint is asked with to those that it was trained with.

    Args:
        before: of the checkpoint, which is in ``folder``.
        text: YAML text of the config, from :func:`liftdist.config.load`.

    Raises:
        UserError: they make another model of what the checkpoint holds.
    """
    after = dataclasses.replace(before, config=text, from_environment=_fingerprints(config, text))
    if found := [redact(line) for kind, line in between(before, after) if kind in (FIXED, STATE)]:
        raise UserError(
            f"{folder}: was trained with other settings: {'; '.join(found)}; ask it with those, or its export as a model of "
            "its own, in another run_dir"
        )


def _kinds() -> dict[str, str]:
    return {key: leaf.metadata["changes"] for key, leaf in schema_tree.settings(Config)}


def _fingerprints(config: Config, text: str) -> dict[str, str]:
    """A short hash of each value that comes from the environment, by key: detects a change without storing the value."""
    values = dict(schema_tree.leaves(dataclasses.asdict(config)))
    written = dict(schema_tree.leaves(yaml.safe_load(text)))
    return {
        key: hashlib.sha256(repr(value).encode()).hexdigest()[:8]
        for key, value in values.items()
        if "${" in repr(written.get(key))
    }
