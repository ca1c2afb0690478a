"""Reading settings: a YAML file, ``key=value`` overrides, validation.

    defaults < YAML file < command line, merged by OmegaConf; an error is one line that names the file and line or the override.

:mod:`liftdist.schema` defines the settings. Imports no torch: a misspelt key is reported in a fraction of a second.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from liftdist import schema
from liftdist.errors import UserError
from liftdist.redaction import note_references, redact, redact_tree
from liftdist.schema import Config

Root = TypeVar("Root")
Where = Callable[[str], str]  # key -> where it was set


@overload
def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, str]: ...
@overload
def load(path: str | Path, overrides: Sequence[str], root: type[Root]) -> tuple[Root, str]: ...
def load(path: str | Path, overrides: Sequence[str] = (), root: type = Config) -> tuple[Any, str]:
    """Read and validate a config.

    Args:
        root: the dataclass of the whole config.

    Returns:
        The resolved config, and its YAML text in which ``${oc.env:...}`` stays unresolved, so that it holds no secrets.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or value out of bounds.
    """
    path = Path(path)
    text = _read(path)
    note_references([text, *overrides])
    locations: dict[str, str] = {}

    def where(key: str) -> str:
        return locations.get(key, f"{path}: {key}")

    config = _merge_file(path, text, root, locations)
    for override in overrides:
        _merge_override(config, override, root, locations)
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = _dotted(getattr(error, "full_key", None))
        missing = "MISSING" in type(error).__name__.upper()
        problem = f"must be given, in the file or as {key}=VALUE" if missing else _explain(error, key, root)
        raise UserError(f"{where(key)}: {problem}") from None
    _validate(resolved, where)
    return resolved, OmegaConf.to_yaml(redact_tree(OmegaConf.to_container(config, resolve=False)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {getattr(error, 'strerror', None) or error}") from None


def _merge_file(path: Path, text: str, root: type, locations: dict[str, str]) -> Any:
    """Merge the settings of the file into the defaults, and record the line of each in ``locations``."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(tree, yaml.MappingNode):
            raise UserError(f"{path}: {'is empty' if tree is None else 'must hold settings, one name: value a line'}")
        nodes = list(_nodes(tree))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}"
        ) from None
    kinds = dict(schema.sections(root))
    for key, line, node in nodes:
        _check_key(key, f"{path}:{line}", root)
        expected = kinds.get(schema.template(key))
        if expected == schema.LIST and not isinstance(node, yaml.SequenceNode):
            raise UserError(f"{path}:{line}: {key} must hold a list of sections, each after a dash")
        if expected == schema.SECTION and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{line}: {key} must hold settings, one name: value a line")
        locations[key] = f"{path}:{line}: {key}"
    config = OmegaConf.structured(root)
    try:
        config.merge_with(OmegaConf.create(text))
    except OmegaConfBaseException as error:
        key = _key_of(error, nodes)
        raise UserError(f"{locations.get(key, f'{path}: {key}')}: {_explain(error, key, root)}") from None
    except yaml.MarkedYAMLError as error:  # rejected by the loader but not by the parser: a duplicate key
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem}") from None
    for key, _, node in nodes:  # YAML 1.1 reads 12:00:00 as 43200 in base 60, which SLURM takes as minutes
        if key == "slurm.time" and isinstance(node, yaml.ScalarNode) and re.fullmatch(_CLOCK, node.value):
            config.slurm.time = str(node.value)
    return config


def _merge_override(config: Any, override: str, root: type, locations: dict[str, str]) -> None:
    """Apply ``key=value``; the key names an entry of a list of sections by its index, from 0."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value")
    _check_key(key, f"override {override!r}", root)
    locations[key] = f"override {override!r}: {key}"
    for match in re.finditer(r"\.(\d+)(?=\.|$)", key):
        entries = OmegaConf.select(config, key[: match.start()])
        if isinstance(entries, ListConfig) and int(match[1]) >= len(entries):
            held = f"0 to {len(entries) - 1}" if entries else "none"
            raise UserError(f"{locations[key]}: there is no entry {match[1]} (entries: {held}); add it in the file")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        OmegaConf.update(config, key, text if re.fullmatch(_CLOCK, text) else parsed["value"])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{locations[key]}: {_explain(error, key, root)}") from None


_CLOCK = r"\d+:\d\d(:\d\d)?"


def _nodes(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int, yaml.Node]]:
    """``(dotted key, line, node)`` of every key in a YAML tree and of every entry in a list of mappings."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1, value
            yield from _nodes(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(entry, yaml.MappingNode) for entry in node.value):
        for number, entry in enumerate(node.value):
            yield f"{prefix}{number}", entry.start_mark.line + 1, entry
            yield from _nodes(entry, f"{prefix}{number}.")


def _key_of(error: Exception, nodes: Sequence[tuple[str, int, yaml.Node]]) -> str:
    """The key that an OmegaConf error is about. For an entry of a list the error holds only its last part, and the value."""
    key = _dotted(getattr(error, "full_key", None))
    for name, _, node in nodes:
        if name.endswith(f".{key}") and isinstance(node, yaml.ScalarNode) and f"'{node.value}'" in str(error):
            return name
    return key


def _dotted(key: str | None) -> str:
    """``a.0.b`` for OmegaConf's ``a[0].b``."""
    return re.sub(r"\[(\d+)\]", r".\1", key or "")


@functools.cache
def _known_keys(root: type) -> dict[str, None]:
    """The keys of all settings and sections, in the order of the file."""
    return dict.fromkeys([*dict(schema.settings(root)), *dict(schema.sections(root))])


def _check_key(key: str, where: str, root: type) -> None:
    form = schema.template(key)
    if form in _known_keys(root):
        return
    known = list(_known_keys(root))
    near = difflib.get_close_matches(form, known, n=1, cutoff=0.5)
    if not near:  # the section may be missing or misspelt
        near = [name for name in known if name.split(".")[-1] == form.split(".")[-1]]
    raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _explain(error: Exception, key: str, root: type) -> str:
    leaf = dict(schema.settings(root)).get(schema.template(key))
    kind = dict(schema.sections(root)).get(schema.template(key))
    if leaf is not None and leaf.metadata["example"]:
        return f"must be a list, in quotes for the shell: {key}='{leaf.metadata['example']}'"
    if kind == schema.LIST:
        return f"is a list of sections; give a setting of one of them, {key}.0.NAME=VALUE"
    if kind == schema.SECTION:
        return f"is a section; give one of its settings, {key}.NAME=VALUE"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {error.problem or error.context}"
    text = str(error).splitlines()[0]
    if "is not Optional" in text:
        return "must not be empty"
    variable = re.search(r"Environment variable '\w+' not found", text)
    return redact(variable[0] if variable else text)


def _validate(config: Any, where: Where) -> None:
    for key, leaf, value in schema.walk(config):
        for item in value if isinstance(value, list) else [value]:
            if problem := _problem(item, leaf.metadata):
                raise UserError(redact(f"{where(key)}: {problem}, got {item!r}"))
    for key, problem in schema.problems(config):
        raise UserError(redact(f"{where(key)}: {problem}"))


def _problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            return "must not be empty"
        if "\0" in value:
            return "must not contain a null character"
        if value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                return "names the home folder of an unknown user"
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
