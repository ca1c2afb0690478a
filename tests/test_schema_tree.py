"""Sections within sections and lists of sections: validated, overridden, compared and listed, like any setting."""

from dataclasses import dataclass, field

import pytest

from liftdist import config as configs
from liftdist import schema_tree
from liftdist.errors import UserError
from liftdist.runs import changes, manifest
from liftdist.schema_tree import COURSE, NOTHING, STATE, setting


@dataclass
class Limits:
    records: int | None = setting(None, "records at most", at_least=1)
    share: float = setting(1.0, "share of them", above=0, at_most=1)


@dataclass
class Source:
    path: str = setting("???", "where it is")
    weight: float = setting(1.0, "how often it is drawn", above=0, changes=COURSE)
    kind: str = setting("auto", "what it holds", choices=("auto", "chat", "text"))
    tags: list[str] = setting([], "words", example="[a, b]")
    limits: Limits = field(default_factory=Limits)

    def problems(self):
        if self.kind == "text" and self.tags:
            yield "tags", "must be empty for kind=text"


@dataclass
class Data:
    sources: list[Source] = field(default_factory=list)
    packing: bool = setting(False, "pack", changes=NOTHING)


@dataclass
class Root:
    name: str = setting("???", "its name", changes=STATE)
    data: Data = field(default_factory=Data)


TEXT = """name: x
data:
  packing: true
  sources:
    - path: a.jsonl
      weight: 2
    - path: b.jsonl
      kind: chat
      limits:
        records: 10
"""


def load(tmp_path, text=TEXT, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return configs.load(path, overrides, Root)


def test_lists_of_sections_are_read_and_overridden(tmp_path):
    overrides = ["data.sources.0.weight=0.5", "data.sources.1.limits.share=0.25", "data.sources.1.tags=[p, q]"]
    config, text = load(tmp_path, overrides=overrides)
    first, second = config.data.sources
    assert (first.path, first.weight, first.kind, first.limits.records) == ("a.jsonl", 0.5, "auto", None)
    assert (second.path, second.weight, second.tags) == ("b.jsonl", 1.0, ["p", "q"])
    assert (second.limits.records, second.limits.share) == (10, 0.25)
    again, _ = load(tmp_path, text)  # what is kept reads back
    assert again == config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXT.replace("weight: 2", "wieght: 2"), "c.yaml:6: unknown key 'data.sources.0.wieght'; did you mean"),
        (TEXT.replace("weight: 2", "weight: -1"), "c.yaml:6: data.sources.0.weight: must be above 0, got -1.0"),
        (TEXT.replace("weight: 2", "weight: heavy"), "c.yaml:6: data.sources.0.weight: Value 'heavy'"),
        (TEXT.replace("kind: chat", "kind: chta"), "c.yaml:8: data.sources.1.kind: must be one of auto, chat"),
        (TEXT.replace("records: 10", "records: 0"), "c.yaml:10: data.sources.1.limits.records: must be at least 1"),
        (TEXT.replace("limits:\n        records: 10", "limits: 10"), "c.yaml:9: data.sources.1.limits must hold settings"),
        (TEXT.replace("kind: chat", "kind: text\n      tags: [x]"), "c.yaml:9: data.sources.1.tags: must be empty for kind=text"),
        ("name: x\ndata:\n  sources: a.jsonl\n", "c.yaml:3: data.sources must hold a list of sections, each after a dash"),
        ("name: x\ndata:\n  sources:\n    path: a\n", "c.yaml:3: data.sources must hold a list of sections"),
        ("name: x\ndata:\n  sources:\n    - weight: 1\n", "data.sources.0.path: must be given, in the file or as"),
        ("data: {}\n", "name: must be given, in the file or as name=VALUE"),
    ],
)  # fmt: skip
def test_mistakes_in_entries_name_their_line(tmp_path, text, problem):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.sources.2.weight=1", "there is no entry 2 (entries: 0 to 1); add it in the file"),
        ("data.sources.0.wieght=1", "unknown key 'data.sources.0.wieght'; did you mean 'data.sources.N.weight'?"),
        ("data.sources.weight=1", "unknown key 'data.sources.weight'; did you mean 'data.sources.N.weight'?"),
        ("data.sources.0.weight=-1", "data.sources.0.weight: must be above 0, got -1.0"),
        ("data.sources=a.jsonl", "is a list of sections; give a setting of one of them, data.sources.0.NAME=VALUE"),
        ("data.sources.0.limits=3", "is a section; give one of its settings, data.sources.0.limits.NAME=VALUE"),
        ("data.sources.0.tags=3", "must be a list, in quotes for the shell: data.sources.0.tags='[a, b]'"),
    ],
)
def test_mistakes_in_overrides_say_how(tmp_path, override, problem):
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides=[override])
    assert problem in str(caught.value)
    assert f"override {override!r}" in str(caught.value)


def test_the_reference_lists_entries():
    assert [key for key, _, _ in schema_tree.reference(Root)] == [
        "name", "data.sources.N.path", "data.sources.N.weight", "data.sources.N.kind", "data.sources.N.tags",
        "data.sources.N.limits.records", "data.sources.N.limits.share", "data.packing",
    ]  # fmt: skip
    assert ("data.sources.N.path", "required", "where it is") in list(schema_tree.reference(Root))


def test_a_changed_entry_is_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(changes.schema_tree, "settings", lambda root: SETTINGS)
    _, before = load(tmp_path)
    _, after = load(tmp_path, overrides=["data.sources.0.weight=3", "data.packing=false"])
    assert changes.of_settings(before, before) == []
    assert changes.of_settings(before, after) == [
        (COURSE, "data.sources.0.weight: 2.0 -> 3.0"), (NOTHING, "data.packing: True -> False"),
    ]  # fmt: skip
    _, fewer = load(tmp_path, "name: x\ndata:\n  packing: true\n  sources:\n    - path: a.jsonl\n      weight: 2\n")
    lost = changes.of_settings(before, fewer)
    assert (COURSE, "data.sources.1.path: b.jsonl -> absent") in lost
    assert all(text.startswith("data.sources.1.") for _, text in lost)


SETTINGS = list(schema_tree.settings(Root))


@dataclass
class Names:
    fields: dict[str, str] = setting({}, "names", example="{a: b}", changes=COURSE)
    lr: float = setting(1.0, "rate")


@dataclass
class Named:
    data: Names = field(default_factory=Names)


NAMED = "data:\n  fields:\n    question: q\n    on: 0012\n    1: yes # a comment\n"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (NAMED, (), {"question": "q", "on": "0012", "1": "yes"}),
        (NAMED, ("data.fields.question=null",), {"question": "null", "on": "0012", "1": "yes"}),
        (
            NAMED,
            ("data.fields.answer= [x], # {y}",),
            {"question": "q", "on": "0012", "1": "yes", "answer": " [x], # {y}"},
        ),
        (NAMED, ("data.fields={answer: 1e3}",), {"answer": "1e3"}),
        (NAMED, ("data.fields={}", "data.fields.a=1", "data.fields.b=on"), {"a": "1", "b": "on"}),
        ("data:\n  fields: {a: 'b: c', d: \"\\t\"}\n", (), {"a": "b: c", "d": "\t"}),
        ("data:\n  fields: {}\n", ("data={fields: {a: 0012}}",), {"a": "0012"}),
        ("data:\n  lr: 2\n", ("data.fields.lr=x",), {"lr": "x"}),
    ],
)
def test_texts_by_name_keep_their_characters(tmp_path, text, overrides, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    config, kept = configs.load(path, overrides, Named)
    assert config.data.fields == expected
    path.write_text(kept)
    assert configs.load(path, (), Named)[0] == config  # what is kept reads back


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        (NAMED, ("data.fields.a=",), "data.fields.a: must not be empty"),
        (NAMED, ("data.fields=a",), "data.fields: must hold texts, one name: text a line"),
        (NAMED, ("data.fields=[a]",), "data.fields: must hold texts, one name: text a line"),
        (NAMED, ("data.fields={a: {b: c}}",), "data.fields.a: YAML reads settings; as a text it needs quotes"),
        (NAMED, ("data.fields={a: b",), "must be names and texts, in quotes for the shell: data.fields='{a: b}'"),
        (NAMED, ("data.fields={a: b, a: c}",), "found duplicate key a"),
        (NAMED, ("data.fields.=x",), "the name after data.fields must consist of letters, digits and underscores"),
        (NAMED, ("data.fields.a.b=x",), "the name after data.fields must consist of letters, digits and underscores"),
        (NAMED, ("data.fields.a[0]=x",), "the name after data.fields must consist of letters, digits and underscores"),
        (NAMED, ("data.feilds.a=x",), "unknown key 'data.feilds.a'; did you mean 'data.fields'?"),
        ("data:\n  fields: a\n", (), "c.yaml:2: data.fields: must hold texts, one name: text a line"),
        ("data:\n  fields:\n", (), "c.yaml:2: data.fields: must hold texts, one name: text a line"),
        (
            "data:\n  fields:\n    a: [b]\n",
            (),
            "c.yaml:3: data.fields.a: YAML reads a list; as a text it needs quotes: '[b]'",
        ),
        ("data:\n  fields:\n    a:\n", (), "c.yaml:3: data.fields.a: must not be empty"),
        ("data:\n  fields:\n    a: ''\n", (), "c.yaml:3: data.fields.a: must not be empty"),
        ("data:\n  fields:\n    a: x\n    a: y\n", (), "c.yaml:4: found duplicate key a"),
    ],
)
def test_mistakes_in_texts_by_name_are_one_line(tmp_path, text, overrides, problem):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        configs.load(path, overrides, Named)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_text_by_name_is_a_change():
    data = "run_dir: r\ndata:\n  fields: {fields}\n"
    before, after = (data.format(fields=fields) for fields in ("{question: q, answer: a}", "{question: p, context: c}"))
    assert changes.of_settings(before, before) == []
    assert changes.of_settings(before, after) == [
        (COURSE, "data.fields.question: q -> p"),
        (COURSE, "data.fields.answer: a -> absent"),
        (COURSE, "data.fields.context: absent -> c"),
    ]
    assert changes.of_settings(data.format(fields="{}"), after) == [
        (COURSE, "data.fields.question: absent -> p"),
        (COURSE, "data.fields.context: absent -> c"),
    ]


@pytest.mark.parametrize(("criterion", "kind"), [("low_rank", NOTHING), ("gradient", COURSE)])
def test_micro_batches_count_where_gradients_choose_what_is_trained(criterion, kind):
    before, after = (
        manifest.Provenance(
            f"selection: {{criterion: {criterion}}}\ntrain: {{micro_batch_size: {size}}}", {}, "b", "d", {}, {}
        )
        for size in (4, 2)
    )
    assert changes.between(before, after) == [(kind, "train.micro_batch_size: 4 -> 2")]
