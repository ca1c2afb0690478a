"""A setting that is a text holds what was typed, from the command line and from a file, and wherever it is handed on."""

import json
from dataclasses import dataclass, field

import pytest
import yaml
from commands import call
from omegaconf import OmegaConf

from liftdist import config as configs
from liftdist import schema
from liftdist.errors import UserError
from liftdist.runs import changes
from liftdist.schema import setting

FILE = "run_dir: runs/x\nmodel:\n  path: m\ndata:\n  path: x.jsonl\nselection:\n  density: 0.05\n"

#: texts that YAML takes for something else, or not at all
TEXTS = [
    "0012", "0042", "007", "08", "12", "-3", "+7", "1_000", "0x1F", "0b101", "0o17", "1:30", "12:30:00", "1.50", ".5", "5.", "1e3",
    "1E-3", "1_0e3", "6.02e+23", "nan", "NaN", ".nan", "inf", "-inf", ".inf", "on", "On", "off", "yes", "NO", "y", "n", "true",
    "False", "null", "Null", "~", "2026-11-25", "2026-11-25 10:00:00", "2026-11-25T10:00:00Z", "=", "==", "<<", "-", "--", "---",
    "...", "- x", "?", "? x", ":", "a: b", "a:", ": a", "a#b", "a #b", "#hash", "# hash", "{brace}", "{", "}", "[x]", "[", "]",
    "[a, b]", ",", "a, b", "*star", "*.mlp.*", "&anchor", "&", "!tag", "!!int 3", "!", "%p", "%", "@at", "`tick`", "|", ">", "|-",
    "'", '"', "it's me", "'single'", '"quoted"', '"half', "'half", '"a" b', "''", '""', "\\", "a\\b", "a\\nb", "C:\\dir", " lead",
    "trail ", "  ", " ", "\t", "a\tb", "\ttab\t", "a\nb", "\n", "a\n\n b\n", "\r", "a\r\nb", "\x07", "\x1b[0m", "\x7f", "\x85", "\u2028",
    "\u00a0", "\ufeff", "\u202e", "é", "e\u0301", "日本", "\U0001f600", "\ue000", "$HOME", "$", "$(x)", "{{x}}", "%(x)s", "a=b", "=a",
    "a;b", "x" * 300, "word " * 60, "/data/a b/0012", "~/x", "s3://b/k?v=1#f", "None", "!!str x", "a  b", "key: [", "٣",
]  # fmt: skip


#: settings that take any text, of each kind
ANY = (
    "run_dir", "cache_dir", "model.path", "model.attn_implementation", "data.path", "data.eval_path", "data.subset", "data.split",
    "data.eval_split", "slurm.container",
)  # fmt: skip


def rows(texts):
    """Texts for the settings ``ANY``, as many at a time."""
    texts = list(texts)
    return [dict(zip(ANY, (texts[at:] + texts)[: len(ANY)], strict=True)) for at in range(0, len(texts), len(ANY))]


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
    return {key: value for key, _, value in schema.walk(config) if key in ANY}


def in_quotes(text):
    return yaml.safe_dump(text, default_style='"', width=10**6).strip()


@pytest.mark.parametrize("texts", rows(TEXTS), ids=ascii)
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
    assert {key: value for key, value in schema.leaves(yaml.safe_load(kept)) if key in ANY} == texts
    assert OmegaConf.create(kept).model.path == texts["model.path"]


#: of those, the ones that a file may hold without quotes
PLAIN = [
    "0012", "0042", "007", "08", "12", "-3", "1_000", "0x1F", "0b101", "1:30", "12:30:00", "1.50", ".5", "5.", "1e3", "nan", ".nan",
    "-inf", "on", "off", "yes", "NO", "y", "true", "False", "2026-11-25", "2026-11-25 10:00:00", "=", "<<", "-x", "a#b", "it's me",
    'a"b"', "a\\b", "C:\\dir", "$HOME", "a=b", "/data/a b/0012", "~/x", "s3://b/k?v=1#f", "None", "日本", "a, b", "a [x]", "a *b",
    "a {x}", "--x=1", "node[1-3]", "x!", "50%", "a@b", "x&y", "nothing", "None.None",
]  # fmt: skip


@pytest.mark.parametrize("texts", rows(PLAIN), ids=ascii)
def test_a_file_needs_no_quotes_for_what_yaml_leaves_whole(texts, tmp_path):
    plain = {key: f"{text}   # a remark" for key, text in texts.items()}
    config, kept = load(tmp_path, write(tree_of(plain | {"slurm.container_mounts": list(plain.values())})))
    assert held(config) == texts
    assert config.slurm.container_mounts == list(texts.values())
    assert load(tmp_path, kept) == (config, kept)
    entries = [text for text in texts.values() if not set(text) & set(",[]{}?")]
    assert load(tmp_path, overrides=[f"selection.modules=[{', '.join(entries)}]"])[0].selection.modules == entries
