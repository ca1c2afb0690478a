"""Settings in YAML, as the tree that its parser composes: it still holds the characters of every scalar.

What the characters stand for depends on the setting, not on YAML: ``data.subset: 0012`` is a text, ``train.seed: 12`` a number.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import ReaderError

from liftdist import schema_tree
from liftdist.errors import UserError

Setting = tuple[str, yaml.Node, yaml.Node]  # dotted key, the node of its name, its node

_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_MAP = "tag:yaml.org,2002:map"
_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_AS_TEXT = [f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value", "merge")]  # JSON has no such values
_IN_JSON = r"true|false|[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?"
_OTHER_BASE = r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)"  # YAML 1.1 reads 010 as 8, and 1:30 as 90


@dataclass(frozen=True)
class Source:
    """YAML that holds settings.

    Args:
        place: says where a node stands.
        root: the dataclass of the whole config.
    """

    text: str
    place: Callable[[yaml.Node], str]
    root: type

    def compose(self) -> yaml.Node | None:
        """The tree; None if the text is empty. Raises ``yaml.YAMLError``."""
        return yaml.compose(self.text, Loader=yaml.SafeLoader)

    def settings(self, tree: yaml.Node, prefix: str = "") -> Iterator[Setting]:
        """Every setting and section below ``tree``. Its texts become texts in the tree.

        Raises:
            UserError: unknown or repeated key, a section that is none, or a value that :meth:`keep` refuses.
        """
        kinds = dict(schema_tree.sections(self.root))
        seen: set[str] = set()
        for key, name, node in _walk(tree, prefix, self.root):
            check_key(key, self.place(name), self.root)
            if key in seen:
                raise UserError(f"{self.place(name)}: found duplicate key {key.rpartition('.')[2]}")
            seen.add(key)
            expected = kinds.get(schema_tree.template(key, self.root))
            if expected == schema_tree.LIST and not isinstance(node, yaml.SequenceNode):
                raise UserError(f"{self.place(name)}: {key} must hold a list of sections, each after a dash")
            has_names = schema_tree.shipped(key, self.root) is not None
            for number, entry in enumerate(node.value if expected == schema_tree.LIST else ()):
                if not isinstance(entry, yaml.MappingNode) and not (has_names and isinstance(entry, yaml.ScalarNode)):
                    raise UserError(f"{self.place(entry)}: {key}.{number} must hold settings, one name: value a line")
            is_name = isinstance(node, yaml.ScalarNode) and schema_tree.shipped(key.rpartition(".")[0], self.root)
            if expected == schema_tree.SECTION and not isinstance(node, yaml.MappingNode) and not is_name:
                raise UserError(f"{self.place(name)}: {key} must hold settings, one name: value a line")
            self.keep(key, name, node)
            if schema_tree.template(key, self.root).count(".") < key.count("."):  # the name of an entry is a text, too
                name.tag = _TEXT
            yield key, name, node

    def add_shipped(self, tree: yaml.Node, prefix: str = "") -> Iterator[Setting]:
        """Put shipped settings in place of their name, an entry of a list of sections or its ``task``, and yield them.

        What the entry sets besides takes the place of theirs. To be called after :meth:`settings`.

        Raises:
            UserError: no such name.
        """
        for key, node in [(prefix[:-1], tree), *((key, node) for key, _, node in _walk(tree, prefix, self.root))]:
            shipped = schema_tree.shipped(key, self.root)
            if shipped is not None and isinstance(node, yaml.SequenceNode):
                node.value[:] = map(_as_section, node.value)
                for number, entry in enumerate(node.value):
                    yield from self._add_to(entry, f"{key}.{number}", shipped)

    def _add_to(self, entry: yaml.MappingNode, key: str, shipped: Callable[[str], str]) -> Iterator[Setting]:
        given = {name.value: value for name, value in entry.value}
        if "task" not in given or given["task"].tag == _NULL:
            return
        place = self.place(entry)
        try:
            source = Source(shipped(given["task"].value), lambda _: place, self.root)
        except ValueError as error:
            raise UserError(f"{place}: {key}: {given['task'].value}: {error}") from None
        found = source.compose()
        assert isinstance(found, yaml.MappingNode)
        yield from source.settings(found, f"{key}.")
        entry.value = [pair for pair in found.value if pair[0].value not in given] + entry.value

    def keep(self, key: str, name: yaml.Node, node: yaml.Node) -> None:
        """Make texts of the scalars of a setting that are to be texts.

        Raises:
            UserError: YAML has lost a part of a text, or reads a number in another base than ten; a value that is none of JSON; a
                number for a switch.
        """
        kind = schema_tree.kind_of_text(key, self.root)
        if kind == schema_tree.NAMED_VALUES and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.place(name)}: {key}: must hold values, one name: value a line")
        if kind == schema_tree.VALUE:
            self._keep_value(key, node, ())
        if kind in (schema_tree.NAMED_VALUES, schema_tree.VALUE):
            return
        if kind is None:
            if isinstance(node, yaml.ScalarNode) and node.style is None and re.fullmatch(_OTHER_BASE, node.value):
                base = 60 if ":" in node.value else 8
                raise UserError(
                    f"{self.place(name)}: {key}: YAML reads {node.value} in base {base}; write it in base 10"
                )
            is_switch = schema_tree.template(key, self.root) in schema_tree.switches(self.root)
            # any number but 0 would be true
            if is_switch and node.tag in (_INT, _FLOAT) and node.value not in ("0", "1"):
                raise UserError(f"{self.place(name)}: {key}: must be true or false, got {node.value}")
            return
        if kind == schema_tree.TEXTS and isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.place(name)}: {key}: must be a list, not settings")
        if kind == schema_tree.NAMED_TEXTS:
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{self.place(name)}: {key}: must hold texts, one name: text a line")
            return  # its entries follow, with keys of their own
        texts = [node]
        if kind == schema_tree.TEXTS:
            texts = node.value if isinstance(node, yaml.SequenceNode) else []
        before = name.end_mark.index if name is not node else 0
        for text in texts:
            if problem := self._lost(text, kind, before):
                raise UserError(f"{self.place(name if text.start_mark.index < before else text)}: {key}: {problem}")
            before = max(before, text.end_mark.index)
            if kind != schema_tree.OPTIONAL_TEXT or text.tag != _NULL:
                text.tag = _TEXT

    def _keep_value(self, key: str, node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
        """Make texts of the scalars of a value, and of its names, that are none of JSON's other types.

        Raises:
            UserError: what YAML and JSON read in two ways; a tag or an anchor; a name that is no text or occurs twice.
        """
        where = f"{self.place(node)}: {key}"
        if any(node is outer for outer in above):
            raise UserError(f"{where}: holds itself")
        if self.text[node.start_mark.index] in "&!":
            written = self.text[node.start_mark.index : node.end_mark.index].partition("\n")[0].strip()
            raise UserError(f"{where}: YAML reads an anchor or a tag; as a text it needs quotes: {_quoted(written)}")
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _AS_TEXT:
                node.tag = _TEXT
            is_json = re.fullmatch(_IN_JSON, node.value, re.IGNORECASE) is not None
            if node.style is None and is_json != (node.tag in (_BOOL, _INT, _FLOAT)):
                raise UserError(
                    f"{where}: {node.value} may be a number, a switch or a text; "
                    f"write it as JSON has it (true, 1000), or in quotes if it is a text: {_quoted(node.value)}"
                )
        elif isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                self._keep_value(key, entry, (*above, node))
        else:
            names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode) and name.value != "<<"]
            if len(set(names)) < len(node.value):
                raise UserError(f"{where}: each name in it must be a text of its own, and occur once")
            for name, entry in node.value:
                name.tag = _TEXT
                self._keep_value(key, entry, (*above, node))

    def _lost(self, node: yaml.Node, kind: str, before: int) -> str | None:
        """What YAML has made of a text; an alias stands for a node that begins before the index ``before``."""
        start = node.start_mark.index
        written = self.text[start : node.end_mark.index].strip()
        comment = re.compile(r"[ \t]*(#\S.*)").match(self.text, start)  # after a blank it is meant as one
        if start < before:
            alias = re.compile(r"\*[^\s,\]}]+").search(self.text, before)
            read, written = "an alias", alias[0] if alias else ""
        elif self.text[start] in "&!":
            read = "an anchor" if self.text[start] == "&" else "a tag"
        elif not isinstance(node, yaml.ScalarNode):
            read = "a list" if isinstance(node, yaml.SequenceNode) else "settings"
        elif node.tag == _NULL and not written and comment:
            read, written = "a comment", comment[1].strip()
        elif node.tag == _NULL and (kind == schema_tree.TEXT or (kind == schema_tree.TEXTS and not written)):
            read = "nothing"
        else:
            return None
        if not written:
            return "must not be empty"
        if "\n" in written:
            return f"must be a text, not {read}"
        return f"YAML reads {read}; as a text it needs quotes: {_quoted(written)}"

    def line(self, error: yaml.YAMLError) -> int:
        """The line that YAML does not take, from 1."""
        if isinstance(error, ReaderError):  # a character
            return self.text.count("\n", 0, error.position) + 1
        quoted = "quoted" in (getattr(error, "context", None) or "")  # quotes that are not closed end with the file
        mark = getattr(error, "context_mark" if quoted else "problem_mark", None)
        return mark.line + 1 if mark else 1

    def hint(self, line: int) -> str:
        """The quotes that ``line`` needs, if it gives a text that YAML does not take without them; or nothing."""
        leaves = dict(schema_tree.settings(self.root))
        texts = {key.rpartition(".")[2]: leaves[key].metadata["example"] for key in schema_tree.texts(self.root)}
        found = re.fullmatch(r"\s*((?:- +)*(?:(\w+):|-))\s+(\S.*?)(?:\s+#.*)?", self.text.split("\n")[line - 1])
        if not found or not found[3].isprintable() or (found[2] and found[2] not in texts):
            return ""
        text = found[3]
        try:
            if yaml.safe_load(text) == text:
                return ""
        except yaml.YAMLError:
            pass
        inside = text[1:-1] if re.fullmatch(r"'.*'|\".*\"", text) else text
        return f"; a text that YAML does not take needs quotes: {found[1]} {texts.get(found[2]) or _quoted(inside)}"


def construct(tree: yaml.Node) -> Any:
    """What a tree holds, as mappings, lists, numbers and texts. Raises ``yaml.YAMLError``."""
    return SafeConstructor().construct_document(tree)


def _walk(node: yaml.Node, prefix: str, root: type) -> Iterator[Setting]:
    """Every key in a tree, and every entry of a list of mappings; not what is inside a value of any type."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = f"{prefix}{name.value}"
            yield key, name, value
            if schema_tree.kind_of_text(key, root) != schema_tree.VALUE:
                yield from _walk(value, f"{key}.", root)
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(entry, yaml.MappingNode) for entry in node.value):
        for number, entry in enumerate(node.value):
            yield f"{prefix}{number}", entry, entry
            yield from _walk(entry, f"{prefix}{number}.", root)


def _as_section(entry: yaml.Node) -> yaml.Node:
    """An entry of a list of sections; of a name alone, the section with it as ``task``."""
    if not isinstance(entry, yaml.ScalarNode):
        return entry
    entry.tag, at = _TEXT, (entry.start_mark, entry.end_mark)
    return yaml.MappingNode(_MAP, [(yaml.ScalarNode(_TEXT, "task", *at), entry)], *at)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@functools.cache
def _known_keys(root: type) -> dict[str, None]:
    """The keys of all settings and sections, in the order of the file."""
    return dict.fromkeys([*dict(schema_tree.settings(root)), *dict(schema_tree.sections(root))])


def check_key(key: str, where: str, root: type) -> None:
    """Raises ``UserError``: no setting or section has this key."""
    if re.search(r"\.N(\.|$)", key):
        raise UserError(f"{where}: {key}: N stands for the number of an entry, from 0; give that")
    form = schema_tree.template(key, root)
    if form in _known_keys(root):
        is_named = schema_tree.texts(root).get(form) in (schema_tree.NAMED_TEXTS, schema_tree.NAMED_VALUES)
        entry = key[len(form) + 1 :] if is_named else ""
        if (entry or key.endswith(".")) and not re.fullmatch(r"\w+", entry):
            raise UserError(f"{where}: {key}: the name after {form} must consist of letters, digits and underscores")
        return
    known = list(_known_keys(root))
    near = difflib.get_close_matches(form, known, n=1, cutoff=0.5)
    if not near:  # the section may be missing or misspelt
        near = [name for name in known if name.split(".")[-1] == form.split(".")[-1]]
    raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
