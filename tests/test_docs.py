"""What the documents say is so: names exist, links lead somewhere, messages are the code's, generated pages are current.

What they show is run in test_examples.py.
"""

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import generate_docs
import guide
import pytest
from torch.distributed.run import get_args_parser

from bench.__main__ import NAMES as BENCHMARKS
from liftdist import cli, environment, schema_tree
from liftdist import config as configs
from liftdist.cluster import job, nodes
from liftdist.data.records import detect_format
from liftdist.options import CONTINUATION_FLAGS
from liftdist.registry import FORMATS
from liftdist.schema import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PATHS = [*(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")), *sorted(DOCS.glob("*.md"))]
PAGES = {path.name: guide.parse(path) for path in PATHS}
BLOCKS = [block for page in PAGES.values() for block in page.blocks]
FOLDERS = "bench|configs|containers|docs|launch|liftdist|slurm|tests"
FOREIGN_FLAGS = {"--user", "--name"}  # that the text names: docker's, and an example of sbatch's

pages = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks.


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_where_it_comes_from(block):
    """A block is run (test_examples.py), parsed, or copied from a run at a date on a machine; plain text is none of them."""
    if block.language == "text":
        assert block.mark is None
        assert "$ " not in block.text
        assert "liftdist " not in block.text
        return
    assert block.mark is not None, "no <!-- test: ... --> or <!-- recorded: DATE, MACHINE --> before it"
    kind, what = block.mark
    if kind == "recorded":
        assert block.language == "console"
        assert re.match(r"20\d\d-\d\d-\d\d, \w", what)
    elif what.startswith("record "):
        record = json.loads(block.text)
        assert detect_format(record) == what.removeprefix("record ")
        FORMATS.load(detect_format(record)).read(record)
    else:
        assert (what, block.language) in {("run", "console"), ("run", "sh"), ("run", "python"), ("parse", "sh")}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("sh", "console")], ids=str)
def test_commands_have_the_flags_and_settings_they_are_given(block):
    for command, _ in block.exchanges:
        check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    """Parse a command as the program does that it is for; files in the repository must exist."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    for word in words:
        if re.match(rf"({FOLDERS})/", word):
            assert (ROOT / word).exists(), word
    program, *rest = words
    if program == "liftdist" and rest[0] in cli.COMMANDS:
        parser = argparse.ArgumentParser(exit_on_error=False)
        cli.COMMANDS[rest[0]].arguments(parser)
        check_overrides(getattr(parser.parse_intermixed_args(rest[1:]), "overrides", []))
    elif program == "torchrun":
        options = get_args_parser().parse_args(rest)
        assert options.module
        assert options.training_script == "liftdist.train"
        check_overrides(options.training_script_args[1:])
    elif "launch/torchrun" in words:
        parser = argparse.ArgumentParser(exit_on_error=False)
        nodes.arguments(parser)
        known = parser.parse_known_args(words[words.index("launch/torchrun") + 1 :])
        check_overrides(known[1][1:])
    elif program == "sbatch":
        check_overrides(words[words.index("slurm/train.sbatch") + 2 :])
    elif words[:3] == ["python", "-m", "bench"]:
        assert words[3] in BENCHMARKS
    elif program.startswith("launch/"):
        check_overrides([word for word in rest if "=" in word])


def check_overrides(words: list[str]) -> None:
    known = dict(schema_tree.settings(Config)) | {
        key: None for key, kind in schema_tree.sections(Config) if kind == schema_tree.LIST
    }
    for word in words:
        if word not in CONTINUATION_FLAGS and word != "train.stpes=100":  # what the page shows to be refused
            assert word.partition("=")[0] in known, word


# ---------------------------------------------------------------------------------------------------------------------
# Text.


@pages
def test_names_in_the_text_exist(page):
    """Settings, flags, files, modules and variables of liftdist, wherever the text names one as code."""
    settings, sections = dict(schema_tree.settings(Config)), dict(schema_tree.sections(Config))
    flags = all_flags() | FOREIGN_FLAGS
    variables = {variable.name for variable in environment.table()}
    for line, code in page.spans:
        where = f"{page.path.name}:{line}: {code}"
        key = re.match(rf"({'|'.join(sections)})\.([\w.]+)", code)
        if key and not code.endswith((".md", ".py", ".jsonl", ".yaml")):
            assert schema_tree.template(key[0], Config) in settings | sections, where
        if code.startswith(("-", "liftdist ", "launch/torchrun ")):
            for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", code if code.startswith("l") else code.split()[0]):
                assert flag in flags, where
        if re.fullmatch(rf"({FOLDERS})/[\w./-]*", code) or re.fullmatch(r"[\w-]+\.(md|toml|txt)", code):
            assert any((base / code).exists() for base in (ROOT, DOCS)) or code in ("command.txt",), where
        if re.fullmatch(r"liftdist(\.\w+)+", code):
            module = ROOT.joinpath(*code.split("."))
            assert module.is_dir() or module.with_suffix(".py").is_file(), where
        if re.fullmatch(r"LIFTDIST_\w+", code):
            assert code in variables, where
        if code.startswith("liftdist ") and "`" not in code:
            assert code.split()[1] in cli.COMMANDS, where
        if code.startswith("python -m bench"):
            check_command(shlex.split(code))


def all_flags() -> set[str]:
    parsers = [job.parser(), argparse.ArgumentParser()]
    nodes.arguments(parsers[1])
    for command in cli.COMMANDS.values():
        parsers.append(argparse.ArgumentParser())
        command.arguments(parsers[-1])
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


@pages
def test_links_lead_somewhere(page):
    for line, target in page.links:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        assert path.exists(), f"{page.path.name}:{line}: {target}"
        if page.path.parent == DOCS:
            assert path.is_relative_to(DOCS), f"{page.path.name}:{line}: {target} is not on the site"
        if anchor:
            assert anchor in guide.parse(path).anchors, f"{page.path.name}:{line}: {target}"


def test_messages_are_those_of_the_code():
    """Each fixed part of a message in docs/troubleshooting.md stands in a text of the code."""
    texts = set()
    for path in (ROOT / "liftdist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    page = PAGES["troubleshooting.md"]
    messages = [line.split("`")[1] for _, line in page.prose if line.startswith("| `")]
    assert len(messages) > 50
    for message in messages:
        parts = [part.strip(" :") for part in message.split("…") if len(part.strip(" ;:,.()")) > 2]
        assert parts, message
        for part in parts:
            assert any(part in text for text in texts), f"{page.path.name}: {message}: no text of the code has {part!r}"


def test_the_readme_is_short():
    prose = [line for _, line in PAGES["README.md"].prose if not line.startswith(("|", "#", "<!--"))]
    assert sum(len(line.split()) for line in prose) < 460  # three minutes aloud


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_starts_with_its_command(path):
    config, _ = configs.load(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# liftdist train configs/", "# liftdist submit configs/"))
    words = shlex.split(first[2:].split("    ")[0])
    assert f"configs/{path.name}" in words
    assert config.run_dir == f"runs/{path.stem}"


# ---------------------------------------------------------------------------------------------------------------------
# The site.


@pytest.mark.parametrize("name", generate_docs.PAGES)
def test_generated_pages_are_current(name):
    assert (DOCS / name).read_text() == generate_docs.PAGES[name](), "run python launch/generate_docs.py"


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    zensical = Path(sys.executable).with_name("zensical")
    built = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "build" / "site"
    for path in DOCS.glob("*.md"):
        html = (site / path.with_suffix(".html").name).read_text()
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]+)", html)
        assert not loaded, path.name
    assert {path.name for path in site.glob("*.svg")} == {path.name for path in DOCS.glob("*.svg")}


def test_every_page_has_a_place_in_the_navigation():
    nav = json.dumps(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    assert {path.name for path in DOCS.glob("*.md")} == set(re.findall(r'"(\w[\w-]*\.md)"', nav))
