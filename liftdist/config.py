"""Reading settings: a YAML file, ``key=value`` overrides, validation.

    defaults < YAML file < command line, merged by OmegaConf; whatever is wrong is one line that names where it stands.

What settings there are stands in :mod:`liftdist.schema`. Imports no torch: a misspelt key is reported in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from liftdist.schema import (
    COURSE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    NAME,
    NOTHING,
    STATE,
    STOP_SIGNALS,
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SelectionConfig,
    SlurmConfig,
    TrainConfig,
    UserError,
    leaves,
    settings,
    settings_table,
)

__all__ = [
    "COURSE", "EXIT_STOPPED", "EXIT_USER_ERROR", "NAME", "NOTHING", "STATE", "STOP_SIGNALS", "CheckpointConfig", "Config",
    "DataConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "SelectionConfig", "SlurmConfig", "TrainConfig", "UserError",
    "leaves", "load", "redact", "settings", "settings_table",
]  # fmt: skip


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """Read and validate a config.

    Returns:
        The resolved config, and its YAML text with ``${oc.env:...}`` left as written, which is safe to keep.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of bounds.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {getattr(error, 'strerror', None) or error}") from None
    _REFERENCED.update(name for part in (text, *overrides) for name in _REFERENCE.findall(part))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: {'is empty' if root is None else 'must hold settings, one name: value a line'}")
        lines = dict(_key_lines(root))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}"
        ) from None
    for key, line in lines.items():
        _check_key(key, f"{path}:{line}")
    for key, value in root.value:
        if key.value in _SECTIONS and not isinstance(value, yaml.MappingNode):
            raise UserError(f"{path}:{lines[key.value]}: {key.value} must hold settings, one name: value a line")

    config = OmegaConf.structured(Config)
    origin = {key: f"{path}:{line}: {key}" for key, line in lines.items()}
    try:
        config.merge_with(OmegaConf.create(text))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{origin.get(key, f'{path}: {key}')}: {_explain(error, key)}") from None
    except yaml.MarkedYAMLError as error:  # what a loader minds and a parser does not: a key given twice
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem}") from None
    if (written := _time_as_written(root)) is not None:
        config.slurm.time = written
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected key=value")
        _check_key(key, f"override {override!r}")
        origin[key] = f"override {override!r}: {key}"
        try:
            config.merge_with_dotlist([f"{key}='{value}'" if re.fullmatch(_CLOCK, value) else override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{origin[key]}: {_explain(error, key)}") from None
    try:
        resolved = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        problem = "must be given" if "MISSING" in type(error).__name__.upper() else _explain(error, key)
        raise UserError(f"{origin.get(key, f'{path}: {key}')}: {problem}") from None
    _validate(resolved, lambda key: origin.get(key, f"{path}: {key}"))
    return resolved, OmegaConf.to_yaml(_redacted(OmegaConf.to_container(config, resolve=False)))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` without secrets: the value of an environment variable that is named like one, or that the config
    asked for by ``${oc.env:NAME}``, is replaced by ``<NAME>``."""
    environment = os.environ if environment is None else environment
    secrets = {n: v for n, v in environment.items() if len(v) >= 4 and (_SECRET_NAME.search(n) or n in _REFERENCED)}
    secrets = {n: v for n, v in secrets.items() if not _HARMLESS_NAME.fullmatch(n)}
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>")
    return text


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


_CLOCK = r"\d+:\d\d(:\d\d)?"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|HOSTNAME|SLURM_\w+")
_REFERENCE = re.compile(r"oc\.env:\s*(\w+)")
_REFERENCED: set[str] = set()  # names of the variables that the config asked for


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _time_as_written(root: yaml.MappingNode) -> str | None:
    """``slurm.time`` where YAML would read a number in base 60: 12:00:00 as 43200, which are minutes to SLURM."""
    sections = {key.value: value for key, value in root.value}
    section = sections.get("slurm")
    if isinstance(section, yaml.MappingNode):
        for key, value in section.value:
            if key.value == "time" and isinstance(value, yaml.ScalarNode) and re.fullmatch(_CLOCK, value.value):
                return str(value.value)
    return None


def _check_key(key: str, where: str) -> None:
    known = [name for name, _ in settings()]
    if key in known or key in _SECTIONS:
        return
    near = difflib.get_close_matches(key, [*known, *_SECTIONS], n=1, cutoff=0.5)
    if not near:  # the section may be what was left out or misspelt
        near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _explain(error: Exception, key: str) -> str:
    if key in _LISTS:
        return f"must be a list, in quotes for the shell: {key}='{_LISTS[key]}'"
    if key in _SECTIONS:
        return f"is a section; give one of its settings, {key}.NAME=VALUE"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {error.problem or error.context}"
    text = str(error).splitlines()[0]
    if "is not Optional" in text:
        return "must not be empty"
    variable = re.search(r"Environment variable '\w+' not found", text)
    return redact(variable[0] if variable else text)


_SECTIONS = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
_LISTS = {
    "selection.modules": '["*.mlp.*"]',
    "optimizer.betas": "[0.9, 0.95]",
    "train.stop_signals": "[SIGTERM, SIGUSR1]",
    "slurm.options": '["--mail-type=END"]',
    "slurm.container_mounts": "[/scratch]",
}


def _validate(config: Config, where: Any) -> None:
    values = dict(leaves(dataclasses.asdict(config)))
    for key, leaf in settings():
        value = values[key]
        for item in value if isinstance(value, list) else [value]:
            problem = _problem(item, leaf.metadata)
            if problem:
                raise UserError(redact(f"{where(key)}: {problem}, got {item!r}"))
    selection, mesh = config.selection, config.mesh
    if (selection.density is None) == (selection.budget_rank is None):
        given = "neither" if selection.density is None else "both"
        raise UserError(
            f"{where('selection.density' if given == 'both' else 'selection')}: "
            f"set exactly one of selection.density and selection.budget_rank, got {given}"
        )
    if len(config.optimizer.betas) != 2:
        raise UserError(f"{where('optimizer.betas')}: must be two numbers, got {config.optimizer.betas}")
    if not selection.modules:
        raise UserError(f"{where('selection.modules')}: must name at least one pattern")
    if mesh.dp_shard == 0:
        raise UserError(f"{where('mesh.dp_shard')}: must be -1 or at least 1, got 0")
    if (
        config.data.packing
        and "flash" in (config.model.attn_implementation or "")
        and config.train.micro_batch_size != 1
    ):
        raise UserError(
            f"{where('train.micro_batch_size')}: must be 1 with data.packing and flash attention (raise data.max_length "
            f"instead), got {config.train.micro_batch_size}"
        )


def _problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            return "must not be empty"
        if "\0" in value:
            return "must not hold a null character"
        if value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                return "names the home folder of nobody"
        if bounds["choices"] and value not in bounds["choices"]:
            near = difflib.get_close_matches(value, bounds["choices"], n=1)
            return f"must be one of {', '.join(bounds['choices'])}" + (f" (did you mean {near[0]}?)" if near else "")
        if bounds["pattern"] and not re.fullmatch(bounds["pattern"], value, re.ASCII):
            return "is not of a form that SLURM takes"
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    checks = (
        ("at_least", value.__ge__, "at least"),
        ("at_most", value.__le__, "at most"),
        ("above", value.__gt__, "above"),
        ("below", value.__lt__, "below"),
    )
    for name, holds, words in checks:
        if bounds[name] is not None and not holds(type(value)(bounds[name])):
            return f"must be {words} {bounds[name]}"
    return None
