"""Reading settings: a YAML file, ``key=value`` overrides, validation.

    defaults < YAML file < command line, merged by OmegaConf; an error is one line that names the file and line or the override.

A text is what was typed: after ``key=``, character by character; in the file, what YAML leaves of it (:mod:`liftdist.yaml_tree`).

:mod:`liftdist.schema` defines the settings. Imports no torch: a misspelt key is reported in a fraction of a second.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from liftdist import schema_tree, yaml_tree
from liftdist.errors import UserError
from liftdist.redaction import note_references, redact, redact_tree
from liftdist.schema import TURN, Config
from liftdist.yaml_tree import Source

Root = TypeVar("Root")
Where = Callable[[str], str]  # key -> where it was set


#: Settings that may differ between the variants of a run, which share a model in the processes of its ranks, and those of them
#: that may not.
OF_VARIANTS = ("selection.", "optimizer.", "data.", "train.", "eval.", "checkpoint.", "metrics.", "sync.")
OF_ALL_VARIANTS = (
    *("selection.modules", "data.packing", "data.max_length", "train.micro_batch_size", "train.fit_memory"),
    *("train.deterministic", "train.stop_signals", "train.hang_timeout", "train.turn", "train.variants"),
)


@overload
def load(path: str | Path, overrides: Sequence[str] = (), *, several: bool = False) -> tuple[Config, str]: ...
@overload
def load(path: str | Path, overrides: Sequence[str], root: type[Root]) -> tuple[Root, str]: ...
def load(
    path: str | Path, overrides: Sequence[str] = (), root: type = Config, *, several: bool = False
) -> tuple[Any, str]:
    """Read and validate a config.

    Args:
        root: the dataclass of the whole config.
        several: take a config of several runs, ``train.variants``, too.

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
    resolved: Any
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = _dotted(getattr(error, "full_key", None))
        missing = "MISSING" in type(error).__name__.upper()
        problem = f"must be given, in the file or as {key}=VALUE" if missing else _explain(error, key, root)
        raise UserError(f"{where(key)}: {problem}") from None
    _validate(resolved, where)
    if root is Config and resolved.train.variants and not several:
        raise UserError(
            f"{where('train.variants')}: makes several runs, which `liftdist train` and `liftdist plan` take; this is for one "
            "run: leave it out (train.variants={}), or give the config.yaml in the folder of one"
        )
    return resolved, OmegaConf.to_yaml(redact_tree(OmegaConf.to_container(config, resolve=False)))


def load_runs(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[Config, str]]:
    """:func:`load` each run of a config: its variants, in ``run_dir/NAME``, or that of the config itself.

    Raises:
        UserError: as :func:`load`, or a variant sets what all have in common.
    """
    base, text = load(path, overrides, several=True)
    runs = []
    for name, words in base.train.variants.items():
        try:
            own = shlex.split(words)
        except ValueError as error:
            raise UserError(f"train.variants.{name}: {str(error)[0].lower()}{str(error)[1:]}: {words}") from None
        for key in (word.partition("=")[0] for word in own):
            if not key.startswith(OF_VARIANTS) or key.startswith(OF_ALL_VARIANTS):
                raise UserError(
                    f"train.variants.{name}: {key}: is the same in all variants, which share a model; start a run of its own"
                )
        common = [override("run_dir", str(Path(base.run_dir) / name)), "train.variants={}", f"train.turn={TURN}"]
        try:
            runs.append(load(path, [*overrides, *own, *common]))
        except UserError as error:
            raise UserError(f"train.variants.{name}: {error}") from None
    folders = [one.sync.to for one, _ in runs if one.sync.to is not None]
    if len(set(folders)) < len(folders):
        raise UserError(
            "train.variants: several publish in one folder; give each a sync.to of its own, or leave it out"
        )
    return runs or [(base, text)]


def override(key: str, text: str) -> str:
    """The override that sets a setting to ``text``, in which a ``${`` is no interpolation."""
    return f"{key}=" + re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {getattr(error, 'strerror', None) or error}") from None


def _merge_file(path: Path, text: str, root: type, locations: dict[str, str]) -> Any:
    """Merge the settings of the file into the defaults, and record the line of each in ``locations``."""
    source = Source(text, lambda node: f"{path}:{node.start_mark.line + 1}", root)
    nodes = []
    try:
        tree = source.compose()
        if not isinstance(tree, yaml.MappingNode):
            raise UserError(f"{path}: {'is empty' if tree is None else 'must hold settings, one name: value a line'}")
        for key, name, node in source.settings(tree):
            locations[key] = f"{source.place(name)}: {key}"
            nodes.append((key, node))
        for key, name, _ in source.add_shipped(tree):
            locations.setdefault(key, f"{source.place(name)}: {key}")
        given = yaml_tree.construct(tree)
    except yaml.YAMLError as error:
        line = source.line(error)
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{path}:{line}: not YAML: {problem}{source.hint(line)}") from None
    config = OmegaConf.structured(root)
    try:
        config.merge_with(OmegaConf.create(given))
    except OmegaConfBaseException as error:
        key = _key_of(error, nodes)
        raise UserError(f"{locations.get(key, f'{path}: {key}')}: {_explain(error, key, root)}") from None
    return config


def _merge_override(config: Any, override: str, root: type, locations: dict[str, str]) -> None:
    """Apply ``key=value``; the key names an entry of a list of sections by its index, from 0."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"override {override!r}: expected key=value; what the shell takes apart (blanks, *, {{a,b}}) needs quotes: "
            "data.path='data/*.jsonl'"
        )
    where = f"override {override!r}"
    yaml_tree.check_key(key, where, root)
    locations[key] = f"{where}: {key}"
    entries_of = key.removesuffix(".task").rpartition(".")[0]
    if key.endswith(".task") and schema_tree.shipped(entries_of, root) is not None:
        raise UserError(f"{locations[key]}: its settings are in place already; give all entries: {entries_of}=[{text}]")
    for match in re.finditer(r"\.(\d+)(?=\.|$)", key):
        entries = OmegaConf.select(config, key[: match.start()])
        if isinstance(entries, ListConfig) and int(match[1]) >= len(entries):
            held = f"0 to {len(entries) - 1}" if entries else "none"
            raise UserError(f"{locations[key]}: there is no entry {match[1]} (entries: {held}); add it in the file")
    kind = schema_tree.kind_of_text(key, root)
    try:
        if kind in (schema_tree.TEXT, schema_tree.OPTIONAL_TEXT):
            OmegaConf.update(config, key, text or None)
            return
        source = Source(text, lambda _: where, root)
        tree = source.compose()
        if tree is not None:
            source.keep(key, tree, tree)
            if isinstance(tree, yaml.SequenceNode):  # it replaces the entries in the file
                for known in [known for known in locations if known.startswith(f"{key}.")]:
                    del locations[known]
            if kind != schema_tree.VALUE:
                locations |= {inner: f"{where}: {inner}" for inner, _, _ in source.settings(tree, f"{key}.")}
                locations |= {inner: f"{where}: {inner}" for inner, _, _ in source.add_shipped(tree, f"{key}.")}
            if isinstance(tree, yaml.SequenceNode) and not _is_whole(tree, text):
                raise yaml.MarkedYAMLError(problem="must be a list in brackets and nothing else")
        if kind == schema_tree.VALUE and text.strip() and not (tree and _is_whole(tree, text)):
            raise yaml.MarkedYAMLError(problem="YAML reads a part of it only")
        replaces = kind in (
            schema_tree.NAMED_TEXTS,
            schema_tree.NAMED_VALUES,
            schema_tree.VALUE,
        )  # those in the file
        OmegaConf.update(config, key, tree and yaml_tree.construct(tree), merge=not replaces)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{locations[key]}: {_explain(error, key, root)}") from None


def _is_whole(tree: yaml.Node, text: str) -> bool:
    """Whether a value is all of the text, without a comment, and a list or names in brackets."""
    is_open = tree.style in ("|", ">") if isinstance(tree, yaml.ScalarNode) else not getattr(tree, "flow_style", True)
    begin, end = tree.start_mark.index, tree.end_mark.index
    return not is_open and not text[:begin].strip() and not text[end:].strip()


def _key_of(error: Exception, nodes: Sequence[tuple[str, yaml.Node]]) -> str:
    """The key that an OmegaConf error is about. For an entry of a list the error holds only its last part, and the value."""
    key = _dotted(getattr(error, "full_key", None))
    for name, node in nodes:
        if name.endswith(f".{key}") and isinstance(node, yaml.ScalarNode) and f"'{node.value}'" in str(error):
            return name
    return key


def _dotted(key: str | None) -> str:
    """``a.0.b`` for OmegaConf's ``a[0].b``."""
    return re.sub(r"\[(\d+)\]", r".\1", key or "")


def _explain(error: Exception, key: str, root: type) -> str:
    leaf = dict(schema_tree.settings(root)).get(schema_tree.template(key, root))
    kind = dict(schema_tree.sections(root)).get(schema_tree.template(key, root))
    text_kind = schema_tree.kind_of_text(key, root)
    if text_kind in (schema_tree.NAMED_TEXTS, schema_tree.NAMED_VALUES) and leaf is not None:
        held = "texts" if text_kind == schema_tree.NAMED_TEXTS else "values"
        return f"must be names and {held}, in quotes for the shell: {key}='{leaf.metadata['example']}'"
    if text_kind == schema_tree.VALUE and isinstance(error, yaml.YAMLError):
        return f"is no value of JSON; a text needs quotes inside those of the shell: {key}='\"text: all of it\"'"
    if leaf is not None and leaf.metadata["example"] and schema_tree.kind_of_text(key, root) != schema_tree.TEXT:
        return f"must be a list, in quotes for the shell: {key}='{leaf.metadata['example']}'"
    if kind == schema_tree.LIST:
        return f"is a list of sections; give a setting of one of them, {key}.0.NAME=VALUE"
    if kind == schema_tree.SECTION:
        return f"is a section; give one of its settings, {key}.NAME=VALUE"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {error.problem or error.context}"
    text = str(error).splitlines()[0]
    if "is not Optional" in text:
        return "must not be empty"
    if isinstance(error, GrammarParseError):
        return r"is no interpolation such as ${oc.env:NAME}; write \${ for the characters ${"
    variable = re.search(r"Environment variable '\w+' not found", text)
    return redact(variable[0] if variable else text)


def _validate(config: Any, where: Where) -> None:
    for key, leaf, value in schema_tree.walk(config):
        is_any = schema_tree.kind_of_text(key, type(config)) == schema_tree.NAMED_VALUES
        for place, item in _items(key, value):
            if problem := _unusable(item) if is_any else _problem(item, leaf.metadata):
                raise UserError(redact(f"{where(place)}: {problem}, got {item!r}"))
    for key, problem in schema_tree.problems(config):
        raise UserError(redact(f"{where(key)}: {problem}"))


def _items(key: str, value: Any) -> list[tuple[str, Any]]:
    """The values that a setting holds, each with its key."""
    if isinstance(value, dict):
        return [(f"{key}.{name}", item) for name, inner in value.items() for _, item in _items(name, inner)]
    return (
        [(key, item) for inner in value for _, item in _items(key, inner)]
        if isinstance(value, list)
        else [(key, value)]
    )


def _unusable(value: Any) -> str | None:
    """What is wrong with a value whatever it is for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, str) and "\0" in value:
        return "must not contain a null character"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "must be UTF-8, in which it is kept"
    return None


def _problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            return "must not be empty"
        if problem := _unusable(value):
            return problem
        if value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                return "names the home folder of an unknown user"
        if bounds["choices"] and value not in bounds["choices"]:
            if value in bounds["refused"]:
                return f"must be one of {', '.join(bounds['choices'])}: {value} {bounds['refused'][value]}"
            near = difflib.get_close_matches(value, bounds["choices"], n=1)
            return f"must be one of {', '.join(bounds['choices'])}" + (f" (did you mean {near[0]}?)" if near else "")
        if bounds["pattern"] and not re.fullmatch(bounds["pattern"], value, re.ASCII):
            example = f", such as {bounds['example']}" if bounds["example"] else ""
            return f"is not of a form that {bounds['taken_by']} takes{example}"
        return None
    if problem := _unusable(value):
        return problem
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
