"""A setting that is a text holds what was typed, from the command line and from a file, and wherever it is handed on."""

from dataclasses import dataclass, field

import pytest
import yaml
from commands import call
from omegaconf import OmegaConf

from liftdist import config as configs
from liftdist import schema, schema_tree
from liftdist.errors import UserError
from liftdist.runs import changes
from liftdist.schema_tree import setting

FILE = "run_dir: runs/x\nmodel:\n  path: m\ndata:\n  path: x.jsonl\nselection:\n  density: 0.05\n"

#: texts that YAML takes for something else, or not at all
TEXTS = [
    "0012", "0042", "007", "08", "12", "-3", "+7", "1_000", "0x1F", "0b101", "0o17", "1:30", "12:30:00", "1.50", ".5", "5.",
    "1e3", "1E-3", "1_0e3", "6.02e+23", "nan", "NaN", ".nan", "inf", "-inf", ".inf", "on", "On", "off", "yes", "NO", "y",
    "n", "true", "False", "null", "Null", "~", "2026-11-25", "2026-11-25 10:00:00", "2026-11-25T10:00:00Z", "=", "==", "<<",
    "-", "--", "---", "...", "- x", "?", "? x", ":", "a: b", "a:", ": a", "a#b", "a #b", "#hash", "# hash", "{brace}", "{",
    "}", "[x]", "[", "]", "[a, b]", ",", "a, b", "*star", "*.mlp.*", "&anchor", "&", "!tag", "!!int 3", "!", "%p", "%",
    "@at", "`tick`", "|", ">", "|-", "'", '"', "it's me", "'single'", '"quoted"', '"half', "'half", '"a" b', "''", '""',
    "\\", "a\\b", "a\\nb", "C:\\dir", " lead", "trail ", "  ", " ", "\t", "a\tb", "\ttab\t", "a\nb", "\n", "a\n\n b\n",
    "\r", "a\r\nb", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028", "\u00a0", "\ufeff", "\u202e", "é", "e\u0301", "日本",
    "\U0001f600", "\ue000", "$HOME", "$", "$(x)", "{{x}}", "%(x)s", "a=b", "=a", "a;b", "x" * 300, "word " * 60,
    "/data/a b/0012", "~/x", "s3://b/k?v=1#f", "None", "!!str x", "a  b", "key: [", "٣",
]  # fmt: skip


#: settings that take any text, of each kind
ANY = (
    "run_dir", "cache_dir", "model.path", "model.attn_implementation", "data.path", "data.eval_path", "data.subset", "data.split",
    "data.eval_split", "data.prompt_template", "slurm.container",
)  # fmt: skip


def rows(texts):
    """Texts for the settings ``ANY``, as many at a time."""
    texts = list(texts)
    return [dict(zip(ANY, (texts[at:] + texts)[: len(ANY)], strict=True)) for at in range(0, len(texts), len(ANY))]


def first(texts):
    return ascii(texts["run_dir"])[:20]


def tree_of(values):
    tree = {"selection": {"density": 0.05}}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def write(tree, indent=""):
    """Settings as a file whose texts are YAML already."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", write(value, f"{indent}  ")]
        elif isinstance(value, list):
            lines += [f"{indent}{name}:", *(f"{indent}- {entry}" for entry in value)]
        else:
            lines.append(f"{indent}{name}: {value}")
    return "\n".join(lines)


def load(tmp_path, text=FILE, overrides=(), root=schema.Config):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    return configs.load(path, overrides, root)


def held(config):
    return {key: value for key, _, value in schema_tree.walk(config) if key in ANY}


def in_quotes(text):
    return yaml.safe_dump(text, default_style='"', width=10**6).strip()


@pytest.mark.parametrize("texts", rows(TEXTS), ids=first)
def test_a_text_is_what_was_typed(texts, tmp_path):
    """On the command line and, in quotes, in a file. What is kept of it reads back, by all that read it."""
    entries = [in_quotes(text) for text in texts.values()]
    lists = ("selection.modules", "slurm.container_mounts")
    overrides = [f"{key}={text}" for key, text in texts.items()] + [f"{key}=[{', '.join(entries)}]" for key in lists]
    config, kept = load(tmp_path, overrides=overrides)
    assert held(config) == texts
    assert config.selection.modules == config.slurm.container_mounts == list(texts.values())

    quoted = {key: in_quotes(text) for key, text in texts.items()} | dict.fromkeys(lists, entries)
    of_file, kept_of_file = load(tmp_path, write(tree_of(quoted)))
    assert (of_file, kept_of_file) == (config, kept)
    assert changes.of_settings(kept, kept_of_file) == []

    assert load(tmp_path, kept) == (config, kept)
    assert {key: value for key, value in schema_tree.leaves(yaml.safe_load(kept)) if key in ANY} == texts
    assert OmegaConf.create(kept).model.path == texts["model.path"]


#: of those, the ones that a file may hold without quotes
PLAIN = [
    "0012", "0042", "007", "08", "12", "-3", "1_000", "0x1F", "0b101", "1:30", "12:30:00", "1.50", ".5", "5.", "1e3", "nan",
    ".nan", "-inf", "on", "off", "yes", "NO", "y", "true", "False", "2026-11-25", "2026-11-25 10:00:00", "=", "<<", "-x",
    "a#b", "it's me", 'a"b"', "a\\b", "C:\\dir", "$HOME", "a=b", "/data/a b/0012", "~/x", "s3://b/k?v=1#f", "None", "日本",
    "a, b", "a [x]", "a *b", "a {x}", "--x=1", "node[1-3]", "x!", "50%", "a@b", "x&y", "nothing", "None.None",
]  # fmt: skip


@pytest.mark.parametrize("texts", rows(PLAIN), ids=first)
def test_a_file_needs_no_quotes_for_what_yaml_leaves_whole(texts, tmp_path):
    plain = {key: f"{text}   # a remark" for key, text in texts.items()}
    config, kept = load(tmp_path, write(tree_of(plain | {"slurm.container_mounts": list(plain.values())})))
    assert held(config) == texts
    assert config.slurm.container_mounts == list(texts.values())
    assert load(tmp_path, kept) == (config, kept)
    entries = [text for text in texts.values() if not set(text) & set(",[]{}?")]
    assert load(tmp_path, overrides=[f"selection.modules=[{', '.join(entries)}]"])[0].selection.modules == entries


REFUSED = [
    ("{brace}", "YAML reads settings; as a text it needs quotes: '{brace}'"),
    ("{}", "as a text it needs quotes: '{}'"),
    ("{a: b}", "as a text it needs quotes: '{a: b}'"),
    ("[x]", "YAML reads a list; as a text it needs quotes: '[x]'"),
    ("[a, it's]", "as a text it needs quotes: '[a, it''s]'"),
    ("[]  # none", "as a text it needs quotes: '[]'"),
    ("&anchor", "YAML reads an anchor; as a text it needs quotes: '&anchor'"),
    ("&a b", "YAML reads an anchor; as a text it needs quotes: '&a b'"),
    ("*here", "YAML reads an alias; as a text it needs quotes: '*here'"),
    ("!tag", "YAML reads a tag; as a text it needs quotes: '!tag'"),
    ("!!int 3", "YAML reads a tag; as a text it needs quotes: '!!int 3'"),
    ("!!binary aGk=", "YAML reads a tag; as a text it needs quotes: '!!binary aGk='"),
    ("#hash", "YAML reads a comment; as a text it needs quotes: '#hash'"),
    ("*star", "found undefined alias 'star'; a text that YAML does not take needs quotes: subset: '*star'"),
    ("*.mlp.*", "a text that YAML does not take needs quotes: subset: '*.mlp.*'"),
    ("%p", "a text that YAML does not take needs quotes: subset: '%p'"),
    ("@at   # remark", "a text that YAML does not take needs quotes: subset: '@at'"),
    ("`tick`", "a text that YAML does not take needs quotes: subset: '`tick`'"),
    ("a: b", "a text that YAML does not take needs quotes: subset: 'a: b'"),
    ("- x", "a text that YAML does not take needs quotes: subset: '- x'"),
    ("'it's me'", "a text that YAML does not take needs quotes: subset: 'it''s me'"),
    ('"C:\\dir"', "a text that YAML does not take needs quotes: subset: 'C:\\dir'"),
    ('"half', "a text that YAML does not take needs quotes: subset: '\"half'"),
    ("{a}/b", "a text that YAML does not take needs quotes: subset: '{a}/b'"),
    ("[1]-x", "a text that YAML does not take needs quotes: subset: '[1]-x'"),
    ("a\x07b", "special characters are not allowed"),
    ("'a\tb", "not YAML"),
    ("{a: 1,\n    b: 2}", "must be a text, not settings"),
]


@pytest.mark.parametrize(("written", "problem"), REFUSED, ids=ascii)
def test_a_file_in_which_yaml_has_lost_characters_is_refused(written, problem, tmp_path):
    named = FILE.replace("density: 0.05", "density: &here 0.05").replace("data:", "").replace("  path: x.jsonl\n", "")
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"{named}data:\n  path: x.jsonl\n  subset: {written}\n  split: good\n")
    line = named.count("\n") + 3
    assert str(caught.value).startswith(f"{tmp_path}/config.yaml:{line}: ")
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("[a, {b}]", "YAML reads settings; as a text it needs quotes: '{b}'"),
        ("[a: b]", "YAML reads settings; as a text it needs quotes: 'a: b'"),
        ("[a, [b]]", "YAML reads a list; as a text it needs quotes: '[b]'"),
        ("['*', *here]", "YAML reads an alias; as a text it needs quotes: '*here'"),
        ("[!x y]", "YAML reads a tag; as a text it needs quotes: '!x y'"),
        ("\n  - a\n  - #b", ":11: selection.modules: YAML reads a comment; as a text it needs quotes: '#b'"),
        ("\n  - a\n  -\n  - b", ":11: selection.modules: must not be empty"),
        ("\n  - a\n  - *.mlp.*", ":11: not YAML: expected alphabetic or numeric character, but found '.'"),
        ("\n  - a\n  - %b", "a text that YAML does not take needs quotes: - '%b'"),
        ("[*.mlp.*]", 'a text that YAML does not take needs quotes: modules: ["*.mlp.*"]'),
        ("a", "must be a list"),
        ("null", "must be a list"),
    ],
)
def test_so_are_entries_of_a_list(written, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"{FILE}  filter_rank: &here 4\n  modules: {written}\n")
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("written", ["null", "~", "NULL", "", "# a remark", "  # a remark", "null # none"])
def test_nothing_unsets_a_text_that_may_be_unset_and_no_other(written, tmp_path):
    config, kept = load(tmp_path, f"{FILE}slurm:\n  account: {written}\n  qos: {written}\n")
    assert (config.slurm.account, config.slurm.qos) == (None, None)
    assert load(tmp_path, kept)[0] == config
    value = written.partition(" #")[0].strip("# ") if "remark" not in written else ""
    nothing = f"YAML reads nothing; as a text it needs quotes: '{value}'" if value else "must not be empty"
    for text, wanted in (
        (FILE.replace("x.jsonl\n", f"x\n  split: {written}\n"), f"data.split: {nothing}"),
        (FILE.replace("path: m\n", f"path: {written}\n"), f"model.path: {nothing}"),
        (FILE.replace("x.jsonl\n", f"{written}\n"), "data.path: must be given, in the file or as data.path=VALUE"),
    ):
        with pytest.raises(UserError) as caught:
            load(tmp_path, text)
        assert wanted in str(caught.value)


def test_on_the_command_line_nothing_unsets_and_null_is_a_text(tmp_path):
    text = f"{FILE}slurm:\n  account: a\n  qos: b\n  partition: c\n"
    config, _ = load(tmp_path, text, ["slurm.account=", "slurm.qos=null", "data.subset=~", "train.steps=null"])
    assert (config.slurm.account, config.slurm.qos, config.slurm.partition) == (None, "null", "c")
    assert (config.data.subset, config.train.steps) == ("~", None)
    for override in ("data.split=", "run_dir=", "model.dtype="):
        with pytest.raises(UserError, match=f"override '{override}': {override[:-1]}: must not be empty"):
            load(tmp_path, text, [override])


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("[0012, on, 1e3, null, ~, 2026-11-25, .5, 0x1F, 12:30:00, nan, =]",
         ["0012", "on", "1e3", "null", "~", "2026-11-25", ".5", "0x1F", "12:30:00", "nan", "="]),
        ('["0012", \'on\', a b, "a, b", "*.mlp.*", \'it\'\'s\']', ["0012", "on", "a b", "a, b", "*.mlp.*", "it's"]),
        (" [ a ,  b c , ] ", ["a", "b c"]),
        ("[a#b, a:b, -c, --d=e, $f]", ["a#b", "a:b", "-c", "--d=e", "$f"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_lists_on_the_command_line(entries, expected, tmp_path):
    config, kept = load(tmp_path, overrides=[f"slurm.container_mounts={entries}"])
    assert config.slurm.container_mounts == expected
    assert load(tmp_path, kept)[0] == config


@pytest.mark.parametrize(
    "entries",
    ["[a] #b", "[a #b]", "[{b}]", "[a: b]", "[&a b]", "[*a]", "[%a]", "[a", "a", "", "- a", "- a #b", "{a}", "null"],
)
def test_lists_that_lose_something_are_refused(entries, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides=[f"slurm.container_mounts={entries}"])
    assert f"override {f'slurm.container_mounts={entries}'!r}: slurm.container_mounts: " in str(caught.value)
    assert "needs quotes" in str(caught.value) or "must be a list" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps=010", "train.steps: YAML reads 010 in base 8; write it in base 10"),
        ("train.steps=1:30", "train.steps: YAML reads 1:30 in base 60; write it in base 10"),
        ("optimizer.lr=1:30.5", "optimizer.lr: YAML reads 1:30.5 in base 60"),
        ("slurm.gpus_per_node=0017", "slurm.gpus_per_node: YAML reads 0017 in base 8"),
        ("train.seed=-0_7", "YAML reads -0_7 in base 8"),
        ("model.offload_activations=2", "model.offload_activations: must be true or false, got 2"),
        ("data.packing=-1", "data.packing: must be true or false, got -1"),
        ("eval.tasks=[{path: a, inside_words: 10}]", "eval.tasks.0.inside_words: must be true or false, got 10"),
        (
            "data.subset=${x",
            r"data.subset: is no interpolation such as ${oc.env:NAME}; write \${ for the characters ${",
        ),
        ("data.subset=a\udcffb", "data.subset: must be UTF-8, in which it is kept, got 'a\\udcffb'"),
        ('selection.modules=["\\ud83d"]', "selection.modules: must be UTF-8"),
        ("data.subset=a\0b", "data.subset: must not contain a null character"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(override, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, overrides=[override])
    assert problem in str(caught.value)
    if "train.steps" in override:
        with pytest.raises(UserError) as caught:
            load(tmp_path, f"{FILE}train:\n  {override[6:].replace('=', ': ')}\n")
        assert f"config.yaml:9: {problem}" in str(caught.value)


def test_numbers_and_switches_are_read_as_before(tmp_path):
    words = [
        "train.seed=1_000", "train.steps=0x10", "optimizer.lr=1e-3", "optimizer.eps=.5", "optimizer.betas=[9e-1, .95]",
        "model.compile=on", "data.packing=yes", "train.export=off", "slurm.gpu_memory=8", "train.eval_interval=0",
    ]  # fmt: skip
    config, kept = load(tmp_path, overrides=words)
    train, optimizer = config.train, config.optimizer
    assert (train.seed, train.steps, train.export, train.eval_interval) == (1000, 16, False, 0)
    assert (optimizer.lr, optimizer.eps, optimizer.betas) == (1e-3, 0.5, [0.9, 0.95])
    assert (config.model.compile, config.data.packing, config.slurm.gpu_memory) == (True, True, 8.0)
    values = dict(word.split("=") for word in words) | {"run_dir": "x", "model.path": "m", "data.path": "x"}
    of_file, _ = load(tmp_path, write(tree_of(values)))
    assert (of_file.train, of_file.optimizer, of_file.slurm) == (train, optimizer, config.slurm)
    assert load(tmp_path, kept)[0] == config


def test_texts_may_hold_interpolations(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBER", "0012")
    monkeypatch.setenv("ODD", "a: {b} #c")
    text = f"{FILE}  modules: ['${{oc.env:ODD}}', 0012]\nslurm:\n  account: ${{oc.env:NUMBER}}\n  qos: a${{oc.env:NUMBER}}b\n"
    config, kept = load(tmp_path, text, ["slurm.partition=${oc.env:NUMBER}", "data.subset=${oc.env:ODD} ${data.split}"])
    assert (config.slurm.account, config.slurm.qos, config.slurm.partition) == ("0012", "a0012b", "0012")
    assert (config.data.subset, config.selection.modules) == ("a: {b} #c train", ["a: {b} #c", "0012"])
    assert "${oc.env:NUMBER}" in kept
    assert load(tmp_path, kept) == (config, kept)
    assert load(tmp_path, overrides=[r"data.subset=a\${x}"])[0].data.subset == "a${x}"


@pytest.mark.parametrize(
    "text", ["0012", "${x}", "a\\${x}", "\\\\${x}", "${", "a\\b ${x} \\", "${a}${b}", "'${x}'", "${oc.env:HOME}", '"q"']
)
def test_a_text_that_is_resolved_is_handed_on(text, tmp_path):
    assert load(tmp_path, overrides=[configs.override("run_dir", text)])[0].run_dir == text


@dataclass
class Source:
    path: str = setting("???", "where it is")
    note: str | None = setting(None, "a note")
    weight: float = setting(1.0, "how often")
    tags: list[str] = setting([], "words", example="[a, b]")


@dataclass
class Root:
    sources: list[Source] = field(default_factory=list)
    first: Source = field(default_factory=Source)


def test_texts_of_sections_in_lists(tmp_path):
    text = "first: {path: 0012, tags: [on, .5]}\nsources:\n"
    text += "- path: 0012\n  note: on\n  weight: 1e1\n  tags: [1e3, null]\n- {path: off, note: ~}\n"
    config, kept = load(tmp_path, text, ["sources.1.path=0x1F", "sources.1.tags=[0042]", "sources.0.note=1:30"], Root)
    assert config.first == Source("0012", None, 1.0, ["on", ".5"])
    assert config.sources == [Source("0012", "1:30", 10.0, ["1e3", "null"]), Source("0x1F", None, 1.0, ["0042"])]
    assert load(tmp_path, kept, (), Root)[0] == config
    whole = ["first={path: 0042, note: null, weight: 2}", "sources=[{path: 1e3, tags: [on]}]"]
    config, _ = load(tmp_path, text, whole, Root)
    assert config.first == Source("0042", None, 2.0, ["on", ".5"])
    assert config.sources == [Source("1e3", None, 1.0, ["on"])]
    for override, problem in (
        ("first={pth: 1}", "unknown key 'first.pth'; did you mean 'first.path'?"),
        ("first={path: {x}}", "first.path: YAML reads settings; as a text it needs quotes: '{x}'"),
        ("sources=[{weight: 010}]", "sources.0.weight: YAML reads 010 in base 8"),
        ("sources=[{path: null}]", "sources.0.path: YAML reads nothing; as a text it needs quotes: 'null'"),
    ):
        with pytest.raises(UserError) as caught:
            load(tmp_path, text, [override], Root)
        assert problem in str(caught.value)
        assert f"override {override!r}" in str(caught.value)


def test_a_section_that_holds_itself_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.yaml:1: first.path: YAML reads an alias"):
        load(tmp_path, "first: &f {note: x, path: *f}\n", (), Root)


def test_fresh_hands_on_the_directory_as_it_is(tmp_path, tiny_model):
    """A directory whose name is a number, a comment and an interpolation to others."""
    taken = tmp_path / "0012 #x ${y}"
    (taken / "attempts").mkdir(parents=True)
    path = tmp_path / "config.yaml"
    path.write_text(FILE.replace("runs/x", rf"'{tmp_path}/0012 #x \${{y}}'"))
    code, said = call("submit", path, "--fresh", f"model.path={tiny_model}", "data.path=0012.jsonl", "--dry-run")
    assert code == 0, said
    assert rf"{tmp_path}/0012 #x \${{y}}-2" in said.replace("'", "")
