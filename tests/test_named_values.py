"""Values of any type by name: each is what its characters say, in YAML and in JSON alike, or refused with the quotes it needs."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from liftdist import config as configs
from liftdist import schema_tree
from liftdist.errors import UserError
from liftdist.runs import changes
from liftdist.schema_tree import COURSE, setting


@dataclass
class Data:
    arguments: dict[str, Any] = setting({}, "arguments", example="{thinking: false}", changes=COURSE)
    lr: float = setting(1.0, "rate")


@dataclass
class Root:
    data: Data = field(default_factory=Data)


FILE = "data:\n  arguments:\n    thinking: true\n    documents:\n      - title: '0012'\n        text: a\n    effort: low # yes\n"
OF_FILE = {"thinking": True, "documents": [{"title": "0012", "text": "a"}], "effort": "low"}

#: what is written after the name, and what it is; from the command line and in a file alike
VALUES = [
    ("false", False), ("true", True), ("True", True), ("FALSE", False), ("12", 12), ("-3", -3), ("+3", 3), ("0", 0),
    ("0.5", 0.5), ("1.0", 1.0), ("1.5e+3", 1500.0), ("null", None), ("~", None), ("low", "low"), ("no way", "no way"),
    ('"false"', "false"), ("'12'", "12"), ('"a\\nb"', "a\nb"), ('""', ""), ("'~x'", "~x"), ("~nobody-here", "~nobody-here"),
    ("2024-07-26", "2024-07-26"), ("26 Jul 2024", "26 Jul 2024"), ("=", "="), ("<<", "<<"), ("a#b", "a#b"), ("日本", "日本"),
    ("[1, true, a, [x]]", [1, True, "a", ["x"]]), ("[]", []), ("{}", {}), ("'${x'", "${x"),
    ("{a: 1, b: {c: [2024-07-26]}}", {"a": 1, "b": {"c": ["2024-07-26"]}}),
    ("[{title: 'on', 1: x, null: y}]", [{"title": "on", "1": "x", "null": "y"}]),
    ('{"a.b": 1, "a": {"b": "2"}}', {"a.b": 1, "a": {"b": "2"}}),
]  # fmt: skip


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return configs.load(path, overrides, Root)


def typed(value):
    """With the types that ``==`` does not tell apart."""
    return repr(value)


@pytest.mark.parametrize(("written", "value"), VALUES, ids=lambda shown: ascii(shown)[:20])
def test_a_value_is_what_was_typed(written, value, tmp_path):
    if written == "'${x'":  # a dollar and a brace begin an interpolation, in every setting
        written = r"'\${x'"
    of_command, kept = load(tmp_path, FILE, f"data.arguments.new={written}")
    assert typed(of_command.data.arguments) == typed(OF_FILE | {"new": value})
    of_file, _ = load(tmp_path, f"data:\n  arguments:\n    new: {written}   # a remark\n")
    assert typed(of_file.data.arguments) == typed({"new": value})
    again, kept_again = load(tmp_path, kept)  # what is kept reads back
    assert typed(again) == typed(of_command)
    assert kept_again == kept
    assert changes.of_settings(kept, kept_again) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), OF_FILE),
        (("data.arguments.thinking=",), OF_FILE | {"thinking": None}),
        (("data.arguments={}", "data.arguments.a=1"), {"a": 1}),
        (("data.arguments={thinking: no_, effort: [x]}",), {"thinking": "no_", "effort": ["x"]}),
        (("data.arguments.documents=[]",), OF_FILE | {"documents": []}),
        (("data.arguments.effort={a: 1}", "data.arguments.effort={b: 2}"), OF_FILE | {"effort": {"b": 2}}),
    ],
)
def test_values_are_replaced_whole(overrides, expected, tmp_path):
    assert typed(load(tmp_path, FILE, *overrides)[0].data.arguments) == typed(expected)


def test_a_value_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFORT", "high")
    config, kept = load(
        tmp_path, FILE, "data.arguments.effort=${oc.env:EFFORT}", "data.arguments.l=['${oc.env:EFFORT}']"
    )
    assert (config.data.arguments["effort"], config.data.arguments["l"]) == ("high", ["high"])
    assert "high" not in kept


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        *((word, f"{word} may be a number, a switch or a text; write it as JSON has it (true, 1000), or in quotes if it is")
          for word in ("on", "off", "yes", "No", "010", "1_000", "0x1F", "1:30", "1e3", ".5", "5.", ".nan", "-.inf")),
        ("[1, [no]]", "no may be a number, a switch or a text"),
        ("{a: {b: 010}}", "010 may be a number"),
        ("!!binary aGk=", "YAML reads an anchor or a tag; as a text it needs quotes: '!!binary aGk='"),
        ("!!float abc", "needs quotes: '!!float abc'"),
        ("&here x", "needs quotes: '&here x'"),
        ("[!x y]", "needs quotes: '!x y'"),
        ("{a: 1, a: 2}", "each name in it must be a text of its own, and occur once"),
        ("{<<: {a: 1}}", "each name in it must be"),
        ("{[a]: 1}", "each name in it must be"),
        ('"\\ud83d"', "must be UTF-8"),
        ('["a\\0b"]', "must not contain a null character"),
        ("{a", ""),
        ("1e999", "may be a number"),
        ("1.0e+999", "must be a finite number"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(written, problem, tmp_path):
    with pytest.raises(UserError) as of_command:
        load(tmp_path, FILE, f"data.arguments.new={written}")
    with pytest.raises(UserError) as of_file:
        load(tmp_path, f"data:\n  arguments:\n    new: {written}\n")
    for caught, place in ((of_command, "override 'data.arguments.new="), (of_file, "c.yaml:")):
        assert problem in str(caught.value)
        assert place in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "written", ["text: all", "text # more", "#tag", "- x", "--- a", "*a", "%a", "@a", "|", "[a] # b", "'a' b"]
)
def test_on_the_command_line_a_value_is_all_that_was_typed(written, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, FILE, f"data.arguments.new={written}")
    assert str(caught.value).endswith(
        "data.arguments.new: is no value of JSON; a text needs quotes inside those of the shell: "
        "data.arguments.new='\"text: all of it\"'"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        ("data:\n  arguments: a\n", (), "c.yaml:2: data.arguments: must hold values, one name: value a line"),
        ("data:\n  arguments:\n", (), "c.yaml:2: data.arguments: must hold values"),
        ("data:\n  arguments: [a]\n", (), "c.yaml:2: data.arguments: must hold values"),
        ("data:\n  arguments:\n    a: 1\n    a: 2\n", (), "c.yaml:4: found duplicate key a"),
        ("data:\n  arguments:\n    a-b: 1\n", (), "c.yaml:3: data.arguments.a-b: the name after data.arguments must consist of"),
        ("data:\n  arguments: &x\n    a: *x\n", (), "data.arguments.a"),
        ("data:\n  arguments:\n    a: {b: {c: &x [*x]}}\n", (), "c.yaml:3: data.arguments.a"),
        (FILE, ("data.arguments=a",), "must hold values, one name: value a line"),
        (FILE, ("data.arguments={a: 1",), "must be names and values, in quotes for the shell: data.arguments='{thinking:"),
        (FILE, ("data.arguments.documents.0.title=x",), "must consist of letters, digits and underscores"),
        (FILE, ("data.arguments.=x",), "must consist of letters, digits and underscores"),
        (FILE, ("data.argument.a=x",), "unknown key 'data.argument.a'; did you mean 'data.arguments'?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(text, overrides, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_value_is_a_change(tmp_path, monkeypatch):
    settings, texts = list(schema_tree.settings(Root)), schema_tree.texts
    monkeypatch.setattr(changes.schema_tree, "settings", lambda root: settings)
    monkeypatch.setattr(changes.schema_tree, "texts", lambda root: texts(Root))
    before = load(tmp_path, "data:\n  arguments: {a: true, b: [{c: 1}], d: x, e: '1'}\n")[1]
    after = load(tmp_path, "data:\n  arguments: {a: 1, b: [{c: 2}], f: null, e: 1}\n")[1]
    assert changes.of_settings(before, before) == []
    assert changes.of_settings(before, after) == [
        (COURSE, "data.arguments.a: True -> 1"),
        (COURSE, "data.arguments.b.0.c: 1 -> 2"),
        (COURSE, "data.arguments.d: x -> absent"),
        (COURSE, "data.arguments.e: 1 -> 1"),
    ]
