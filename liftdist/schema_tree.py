"""Settings in general: declared, and walked as a tree. The settings of a run are in :mod:`liftdist.schema`.

A section is a dataclass. It may hold sections, and lists of sections, whose entries have the keys SECTION.LIST.0.SETTING, ...
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

import yaml
from omegaconf import MISSING

Problem = tuple[str, str]  # (key of a setting within its section, or "", what is wrong)

# what a changed setting affects in a run that continues, see runs/changes.py
NOTHING = "nothing"  # no effect on the losses, except for the order of summation
COURSE = "course"  # how training continues
STATE = "state"  # the meaning of the saved state
FIXED = "fixed"  # what the saved state is of: cannot be changed


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    pattern: str | None = None,
    taken_by: str = "this setting",
    example: str | None = None,
    changes: str = COURSE,
) -> Any:
    """A setting of a section: its default, meaning in one line, and bounds.

    Args:
        refused: choices that one might expect, and why there are none.
        pattern: regular expression that the whole text must match.
        taken_by: who takes nothing else, for error messages.
        example: example of a list or of names and texts, for error messages.
        changes: what a change affects in a run that continues: ``NOTHING``, ``COURSE``, ``STATE`` or ``FIXED``.
    """
    metadata: dict[str, Any] = dict(
        help=help, choices=choices, at_least=at_least, at_most=at_most, above=above, below=below
    )
    metadata |= dict(pattern=pattern, taken_by=taken_by, example=example, changes=changes, refused=refused or {})
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting as ``(dotted key, dataclass field)``, in the order of the file; ``N`` stands for the index of an entry.

    What a change affects is ``NOTHING`` for all settings of a list that says so.
    """
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is None:
            yield f"{prefix}{leaf.name}", leaf
            continue
        for key, found in settings(inner, f"{prefix}{leaf.name}{dots}"):
            if leaf.metadata.get("changes") == NOTHING:
                found = copy.copy(found)
                found.metadata = types.MappingProxyType({**found.metadata, "changes": NOTHING})
            yield key, found


def default_of(leaf: dataclasses.Field) -> Any:
    return leaf.default_factory() if callable(leaf.default_factory) else leaf.default


SECTION, LIST = "section", "list of sections"


def sections(section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, SECTION or LIST)`` of all sections, of lists of them, and of their entries."""
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is not None:
            key = f"{prefix}{leaf.name}"
            yield from [(key, SECTION)] if dots == "." else [(key, LIST), (f"{key}.N", SECTION)]
            yield from sections(inner, f"{key}{dots}")


def shipped(key: str, root: type) -> Callable[[str], str] | None:
    """What gives the YAML of an entry by name, of a list of sections that takes names; None for any other key."""
    for name, section in _entries(root, ""):
        if name == template(key, root):
            return getattr(section, "shipped", None)
    return None


def _entries(section: type, prefix: str) -> Iterator[tuple[str, type]]:
    """``(dotted key, section of an entry)`` of all lists of sections."""
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is not None:
            yield from [(f"{prefix}{leaf.name}", inner)] if dots != "." else []
            yield from _entries(inner, f"{prefix}{leaf.name}{dots}")


TEXT, OPTIONAL_TEXT, TEXTS, NAMED_TEXTS = "text", "text or unset", "list of texts", "texts by name"
NAMED_VALUES, VALUE = "values by name", "value"  # of any type that JSON has


@functools.cache
def texts(root: type) -> dict[str, str]:
    """The settings that hold texts, or values of any type, by their key as in :func:`settings`: one of the kinds above."""
    return dict(_texts(root, ""))


def _texts(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        hint = _hints(section)[leaf.name]
        if inner is not None:
            yield from _texts(inner, f"{prefix}{leaf.name}{dots}")
        elif hint is str or hint == str | None:
            yield f"{prefix}{leaf.name}", TEXT if hint is str else OPTIONAL_TEXT
        elif typing.get_origin(hint) is list and typing.get_args(hint) == (str,):
            yield f"{prefix}{leaf.name}", TEXTS
        elif typing.get_origin(hint) is dict and typing.get_args(hint) == (str, str):
            yield f"{prefix}{leaf.name}", NAMED_TEXTS
        elif typing.get_origin(hint) is dict:
            yield f"{prefix}{leaf.name}", NAMED_VALUES


@functools.cache
def switches(root: type) -> set[str]:
    """The settings that are true or false, by their key as in :func:`settings`."""
    return {key for key, leaf in settings(root) if leaf.type in (bool, "bool")}


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _section(section: type, leaf: dataclasses.Field) -> tuple[type | None, str]:
    """The section that a field holds, or None, and the separator between its key and those of the section."""
    hint = _hints(section)[leaf.name]
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), "."
    entry = next(iter(typing.get_args(hint)), None)
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(entry):
        return typing.cast(type, entry), ".N."
    return None, ""


def template(key: str, root: type) -> str:
    """The key as in :func:`settings`: ``a.N.b`` for ``a.0.b``, and ``a`` for ``a.name``, an entry of texts or values by name."""
    key = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)
    named = (name for name, kind in texts(root).items() if kind in (NAMED_TEXTS, NAMED_VALUES))
    return next((name for name in named if key.startswith(f"{name}.")), key)


def kind_of_text(key: str, root: type) -> str | None:
    """What :func:`texts` says of a setting; ``TEXT`` for an entry of texts by name, ``VALUE`` for one of values by name."""
    kind = texts(root).get(template(key, root))
    is_entry = template(key, root).count(".") < key.count(".")
    return {NAMED_TEXTS: TEXT, NAMED_VALUES: VALUE}.get(kind or "", kind) if is_entry else kind


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """``(dotted key, field, value)`` of every setting of a config."""
    for leaf in dataclasses.fields(section):
        key, value = f"{prefix}{leaf.name}", getattr(section, leaf.name)
        inner, dots = _section(type(section), leaf)
        if inner is None:
            yield key, leaf, value
        elif dots == ".":
            yield from walk(value, f"{key}.")
        else:
            for number, entry in enumerate(value):
                yield from walk(entry, f"{key}.{number}.")


def problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Inconsistent settings of a config: the results of each section's ``problems``, with full keys."""
    own = getattr(section, "problems", None)
    for key, problem in own() if own is not None else ():
        yield (f"{prefix}.{key}" if key else prefix).lstrip("."), problem
    for leaf in dataclasses.fields(section):
        inner, dots = _section(type(section), leaf)
        value, key = getattr(section, leaf.name), f"{prefix}.{leaf.name}".lstrip(".")
        if inner is not None:
            entries = [(key, value)] if dots == "." else [(f"{key}.{i}", entry) for i, entry in enumerate(value)]
            for name, entry in entries:
                yield from problems(entry, name)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of every setting in a config as nested mappings and lists."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                yield from leaves(entry, f"{prefix}{key}.{number}.")
        else:
            yield f"{prefix}{key}", value


def reference(section: type) -> Iterator[tuple[str, str, str]]:
    """``(key, default, meaning)`` of every setting, as text with code in backticks."""
    for key, leaf in settings(section):
        default = default_of(leaf)
        if default == MISSING:
            shown = "required"
        elif default is None:
            shown = "unset"
        else:
            shown = f"`{yaml.safe_dump(default, default_flow_style=True).splitlines()[0]}`"
        choices = leaf.metadata["choices"]
        yield key, shown, leaf.metadata["help"] + (f" ({', '.join(f'`{c}`' for c in choices)})" if choices else "")
