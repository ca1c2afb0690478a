"""Settings of sources: what they inherit, what they are called, and what is refused."""

import pytest

from liftdist import config as configs
from liftdist import schema_tree
from liftdist.data_settings import DataConfig, EvalSourceConfig, SourceConfig
from liftdist.errors import UserError
from liftdist.schema import Config

BASE = "run_dir: r\nmodel: {path: m}\nselection: {density: 0.05}\ndata:\n"
TWO = "  sources:\n  - {path: a.jsonl, weight: 1}\n  - {path: b.jsonl, weight: 3}\n"
ONE = "  path: x.jsonl\n"
HERE = "settings, one name: value a line"


def load(tmp_path, data, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + data)
    return configs.load(path, overrides)[0].data


@pytest.mark.parametrize(
    ("data", "override", "problem"),
    [
        (TWO + ONE, None, "c.yaml:8: data.path: is given, and data.sources, too; unset one of them: data.path= or"),
        (TWO, "data.path=x", "override 'data.path=x': data.path: is given, and data.sources, too"),
        ("  packing: true\n", None, "data.path: must be given, in the file or as data.path=VALUE; or data.sources"),
        ("  sources: []\n", None, "data.path: must be given"),
        (TWO, "data.sources=[]", "data.path: must be given"),
        (TWO, "data.sources=", "data.sources: is a list of sections; give a setting of one of them, data.sources.0.NAME=VALUE"),
        (TWO, "data.sources=a.jsonl", "data.sources: is a list of sections; give a setting of one of them"),
        (TWO, "data.sources={path: a}", "unknown key 'data.sources.path'; did you mean 'data.sources.N.path'?"),
        (TWO, "data.sources=[a, b]", "data.sources: is a list of sections; give a setting of one of them"),
        (TWO, "data.sources.0=a.jsonl", "data.sources.0: is a section; give one of its settings, data.sources.0.NAME=VALUE"),
        (TWO, "data.sources.2.path=x", "data.sources.2.path: there is no entry 2 (entries: 0 to 1); add it in the file"),
        (ONE, "data.sources.0.path=x", "data.sources.0.path: there is no entry 0 (entries: none); add it in the file"),
        (TWO, "data.sources.N.path=x", "data.sources.N.path: N stands for the number of an entry, from 0; give that"),
        (TWO, "data.sources.-1.path=x", "unknown key 'data.sources.-1.path'"),
        (TWO, "data.sources.0.path=", "data.sources.0.path: must not be empty"),
        ("  sources:\n", None, "c.yaml:5: data.sources must hold a list of sections, each after a dash"),
        ("  sources:\n  - a.jsonl\n  - path: b\n", None, f"c.yaml:6: data.sources.0 must hold {HERE}"),
        ("  sources:\n  - path: a\n  -\n", None, f"data.sources.1 must hold {HERE}"),
        ("  sources:\n  - weight: 1\n", None, "data.sources.0.path: must be given, in the file or as data.sources.0.path=VALUE"),
        (TWO.replace("weight: 3", "wieght: 3"), None, "c.yaml:7: unknown key 'data.sources.1.wieght'; did you mean"),
        (TWO.replace("weight: 3", "eval_path: 3"), None, "c.yaml:7: unknown key 'data.sources.1.eval_path'"),
        *((TWO, f"data.sources.0.weight={value}", f"data.sources.0.weight: {problem}") for value, problem in (
            ("0", "must be above 0, got 0.0"), ("-1", "must be above 0, got -1.0"), ("nan", "must be a finite number, got nan"),
            ("inf", "must be a finite number, got inf"), ("much", "Value 'much' of type 'str' could not be converted"),
            ("", "must be given, as data.sources.1 has one: all sources have a weight, or none"),
        )),
        (TWO.replace(", weight: 3", ""), None, "data.sources.1.weight: must be given, as data.sources.0 has one"),
        (TWO.replace("weight: 3", "samples: 3"), None,
         "c.yaml:7: data.sources.1.samples: is not used where sources have a weight; leave one of them out"),
        (TWO, "data.sources.0.samples=3", "data.sources.0.samples: is not used where sources have a weight"),
        (TWO.replace("weight: 1", "samples: 0").replace(", weight: 3", ""), None, "c.yaml:6: data.sources.0.samples: must be at"),
        (TWO, "data.sources.1.path=x/a.csv.gz", "data.sources.1.path: a is also the name of data.sources.0; give one of them "
         "another: data.sources.1.name=NAME"),
        (TWO, "data.sources.1.name=a", "override 'data.sources.1.name=a': data.sources.1.name: a is also the name of"),
        (TWO + "  eval_sources:\n  - path: a/x.csv\n  - path: b/x.csv\n", None, "c.yaml:10: data.eval_sources.1.path: x is also"),
        *((TWO, f"data.sources.0.name={name}", "data.sources.0.name: must consist of letters, digits and the characters . - _")
          for name in ("a b", "a/b", "a\tb", "*")),
        (TWO + "  eval_path: e\n  eval_share: 0.1\n", None, "c.yaml:9: data.eval_share: cannot be given together with"),
        (TWO + "  eval_path: e\n  eval_sources:\n  - path: x\n", None, "data.eval_sources: cannot be given together with"),
        (TWO + "  eval_share: 0.1\n  eval_sources:\n  - path: x\n", None, "data.eval_share: cannot be given together with"),
        (TWO + "  eval_sources:\n  - {path: x, weight: 1}\n", None, "c.yaml:9: unknown key 'data.eval_sources.0.weight'"),
        *((ONE, f"data.eval_share={share}", f"data.eval_share: must be {problem}") for share, problem in (
            ("0.6", "at most 0.5"), ("0", "above 0"), ("-0.1", "above 0"), ("nan", "a finite number"),
        )),
        (TWO, "data.subset=x", "data.subset: is the subset of data.path, which is not set; a source in a list has its own"),
        (TWO, "data.revision=x", "data.revision: is the revision of data.path, which is not set; a source in a list has its own"),
        (ONE, "data.eval_subset=x", "data.eval_subset: is the subset of data.eval_path, which is not set"),
        (TWO + "  prompt_template: '{a}'\n  response_template: '{b}'\n", "data.sources.1.format=alpaca",
         "data.sources.1.format: is not used with data.prompt_template and data.response_template; leave it out"),
        (TWO, "data.sources.0.response_template={b}",
         "data.sources.0.response_template: needs data.prompt_template, too; it may be {field} alone"),
        (TWO, "data.sources.0.format=alpcaa", "must be one of auto, messages"),
        (TWO, "data.sources.0.fields=x", "data.sources.0.fields: must hold texts, one name: text a line"),
        (TWO, "data.sources.0.turns=both", "data.sources.0.turns: must be one of auto, whole, split, got 'both'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, data, override, problem):
    with pytest.raises(UserError) as caught:
        load(tmp_path, data, *([override] if override else []))
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_source_has_its_own_settings_and_those_of_data(tmp_path):
    data = load(
        tmp_path,
        TWO + "  format: alpaca\n  fields: {instruction: q}\n  split: dev\n  learn: last\n  eval_split: held\n"
        "  eval_sources:\n  - {path: o/e, format: auto}\n  - {path: b.jsonl, split: dev}\n",
        "data.sources.1.format=prompt_response", "data.sources.1.fields.prompt=p", "data.sources.0.split=train",
        "data.sources.1.turns=split", "data.sources.0.name=first",
    )  # fmt: skip
    first, second, third, fourth = data.all_sources
    assert [source.key for source in data.all_sources] == [
        "data.sources.0.path", "data.sources.1.path", "data.eval_sources.0.path", "data.eval_sources.1.path",
    ]  # fmt: skip
    assert [source.name for source in data.all_sources] == ["first", "b", "e", "b"]
    assert (first.format, first.fields, first.split, first.learn, first.turns) == (
        "alpaca",
        {"instruction": "q"},
        "train",
        "last",
        "auto",
    )
    assert (second.format, second.fields, second.split, second.turns) == (
        "prompt_response",
        {"prompt": "p"},
        "dev",
        "split",
    )
    assert (third.format, third.split, third.learn) == ("auto", "held", "last")
    assert fourth.split == "dev"
    assert [source.weight for source in data.training_sources] == [1, 3]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/math.jsonl", "math"), ("data/math.train.jsonl.gz", "math.train"), ("~/x/Math-10.json", "Math-10"),
        ("OWNER/Name", "Name"), ("squad", "squad"), ("hf://datasets/O/n/dir/file.tsv", "file"), ("data/", "data"),
        ("/x/saved", "saved"), ("data/*.jsonl", "data"), ("data/train-*.parquet", "train"), ("data/[0-9].jsonl", "data"),
        ("x/**/*.jsonl", "x"), ("*", "data"), ("a b/c (d).jsonl", "c_d"), ("größe.jsonl", "größe"), ("v1.0/", "v1.0"),
    ],
)  # fmt: skip
def test_a_source_is_named_after_its_path(path, name):
    assert DataConfig(path=path).training_sources[0].name == name
    assert DataConfig(path="x", eval_sources=[EvalSourceConfig(path=path)]).held_out_sources[0].name == name


@pytest.mark.parametrize(
    ("training", "held_out", "expected"),
    [
        ([("o/a", "v1", None)], ("o/a", None, None), ("v1", None)),
        ([("o/a", "v1", "x"), ("o/b", "v2", "y")], ("o/b", None, None), ("v2", "y")),
        ([("o/a", "v1", "x"), ("o/a", "v1", "y")], ("o/a", None, "y"), ("v1", "y")),
        ([("o/a", "v1", "x"), ("o/a", "v2", "x")], ("o/a", None, None), (None, "x")),
        ([("o/a", "v1", "x")], ("o/a", "v3", "z"), ("v3", "z")),
        ([("hf://datasets/o/a/t.csv", "v1", None)], ("hf://datasets/o/a/e.csv", None, None), ("v1", None)),
        ([("o/a", "v1", "x")], ("o/c", None, None), (None, None)),
    ],
)
def test_revision_and_subset_of_a_held_out_set_are_those_of_the_same_repository(training, held_out, expected):
    sources = [SourceConfig(path=p, revision=r, subset=s, name=f"n{i}") for i, (p, r, s) in enumerate(training)]
    path, revision, subset = held_out
    data = DataConfig(
        sources=sources, eval_sources=[EvalSourceConfig(path=path, revision=revision, subset=subset, name="e")]
    )
    (found,) = data.held_out_sources
    assert (found.revision, found.subset) == expected


def test_what_a_change_of_a_source_changes():
    kinds = {key: leaf.metadata["changes"] for key, leaf in schema_tree.settings(Config)}
    assert (
        kinds["data.sources.N.path"] == kinds["data.sources.N.weight"] == kinds["data.eval_share"] == schema_tree.COURSE
    )
    assert kinds["data.sources.N.name"] == kinds["data.sources.N.revision"] == schema_tree.NOTHING
    assert {kinds[key] for key in kinds if key.startswith("data.eval_sources.")} == {schema_tree.NOTHING}
