"""The files that a path means: patterns, folders, splits, saved and cloned data sets. Never more or less than was meant."""

import contextlib
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

import builders
import datasets
import pytest
from commands import call, write_config

from liftdist.data import sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.errors import UserError


def lines(*values):
    return "".join(json.dumps({"prompt": value, "completion": "x"}) + "\n" for value in values)


def fill(folder, **files):
    """Files whose names have ``__`` for a slash: their text or, in letters alone, the prompts of their records."""
    for name, contents in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = lines(*contents) if isinstance(contents, list) or contents.isalpha() else contents
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return folder


def prompts(path, subset=None, split="train"):
    source = sources.open_source(str(path), subset, split)
    found = [record["prompt"] for _, record in source.read(0, 99)]
    assert len(source) == len(found)
    return "".join(found)


README = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-0.jsonl, data/test-1.jsonl]
- config_name: other
  data_dir: more
  data_files: "*.csv"
---
# A data set
"""
CLONE = {
    "README.md": README, ".gitattributes": "", "data__train-0.jsonl": "a", "data__train-1.jsonl": "b", "data__test-0.jsonl": "c",
    "data__test-1.jsonl": "d", "more__x.csv": "prompt,completion\ne,x\n", ".git__config.jsonl": "z",
}  # fmt: skip
SPLITS = {
    "train-2.jsonl": "b",
    "train-10.jsonl": "a",
    "dev.jsonl": "c",
    "my_test_set.jsonl": "d",
    "README.md": "# Mine",
}
PARTS = {"b.jsonl": "bc", "a.jsonl": "a", "c.ndjson": "d"}

MEANT = {
    # case: (files, path, subset, split, prompts)
    "one": (PARTS, "b.jsonl", None, "train", "bc"),
    "pattern": (PARTS, "*.jsonl", None, "train", "abc"),
    "suffixes": (PARTS, "*", None, "train", "abcd"),
    "alternatives": (PARTS, "[ab].*", None, "test", "abc"),
    "recursive": ({"x__a.jsonl": "a", "y__z__b.jsonl": "b", "y__c.json": "c"}, "**/*.json*", None, "train", "acb"),
    "brackets": ({"a[1].jsonl": "a", "a1.jsonl": "b"}, "a[1].jsonl", None, "train", "a"),
    "folder": (PARTS, ".", None, "train", "abcd"),
    "folder below": ({"README.md": "", "data__b.jsonl.gz": "b", "data__a.json": "a"}, ".", None, "train", "ab"),
    "others": ({**PARTS, "LICENSE.txt": "x", ".hidden.jsonl": "z", "_cache.jsonl": "z"}, ".", None, "train", "abcd"),
    "train": (SPLITS, ".", None, "train", "ab"),
    "validation": (SPLITS, ".", None, "validation", "c"),
    "test": (SPLITS, ".", None, "test", "d"),
    "empty files": ({"a.jsonl": "", "b.jsonl": "b", "c.jsonl": "\n"}, ".", None, "train", "b"),
    "parts": ({f"train-{n}-of-2.jsonl": value for n, value in ((0, "a"), (1, "b"))}, ".", None, "train", "ab"),
    "some of the parts": ({"train-0-of-9.jsonl": "a", "train-1-of-9.jsonl": "b"}, "train-*", None, "train", "ab"),
    "clone": (CLONE, ".", None, "train", "ab"),
    "clone test": (CLONE, ".", None, "test", "cd"),
    "clone subset": (CLONE, ".", "other", "train", "e"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_a_path_means(case, tmp_path):
    files, path, subset, split, expected = MEANT[case]
    fill(tmp_path, **files)
    assert prompts(f"{tmp_path}/{path}", subset, split) == expected


TWO = README.replace("  default: true\n", "")
SHARDS = {f"train-0000{number}-of-00003.jsonl": "a" for number in (0, 2)}
PART = {"data__train-00001-of-00002.jsonl": "a"}
STRANGE = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
REFUSED = {
    "no match": (PARTS, "*.csv", None, "train", "/*.csv: no file matches"),
    "matches no data": ({"a.jsonl": "a", "notes.txt": ""}, "*", None, "train", "/notes.txt: must end in .jsonl"),
    "kinds": ({"a.jsonl": "a", "b.csv": "prompt\na\n"}, ".", None, "train", "several kinds (.csv, .json); name those of one"),
    "twice": ({"a.jsonl": "a", "a.jsonl.gz": "a"}, ".", None, "train", "a.jsonl and a.jsonl.gz look like the same data"),
    "unknown compression": ({"a.jsonl": "a", "b.jsonl.lz4": "b"}, ".", None, "train", "b.jsonl.lz4: must end in .jsonl"),
    "left over": ({"a.jsonl": "a", "a.jsonl.tmp": "b"}, ".", None, "train", "a.jsonl.tmp: must end in .jsonl"),
    "no data": ({"notes.txt": "a"}, ".", None, "train", "holds no data file; these must end in .jsonl"),
    "blank files": ({"a.jsonl": "", "b.jsonl": "\n"}, ".", None, "train", "holds no record"),
    "folders": ({"en__a.jsonl": "a", "fr__a.jsonl": "b"}, ".", None, "train", "in several folders (en, fr); name one"),
    "above and below": ({"a.jsonl": "a", "old__a.jsonl": "b"}, ".", None, "train", "in several folders (., old)"),
    "no split": (SPLITS, ".", None, "dev", "has no split dev; those it has: "),
    "only test": ({"test.jsonl": "a"}, ".", None, "train", "has no split train; those it has: test"),
    "half named": ({**SPLITS, "extra.jsonl": "e"}, ".", None, "train", "named after a split, and extra.jsonl is not"),
    "two splits": ({"train_test.jsonl": "a", "train.jsonl": "b"}, ".", None, "train", "a split, and train_test.jsonl is not"),
    "unnamed split": (PARTS, ".", None, "validation", "no file in it is named after split validation"),
    "split of a file": (PARTS, "a.jsonl", None, "train[:10]", "has no split train[:10]: that is for data sets"),
    "split of a pattern": (PARTS, "*.jsonl", None, "validation", "has no split validation"),
    "part of a split": (SPLITS, ".", None, "train[:1]", "has no split train[:1]; those it has"),
    "subset of a file": (PARTS, "a.jsonl", "main", "train", "has no subset main: that is for data sets"),
    "subset of a folder": (PARTS, ".", "main", "train", "names no subsets, so it has no main; leave data.subset out"),
    "no subset": (CLONE, ".", "none", "train", "has no subset none; those it has: main, other"),
    "which subset": ({**CLONE, "README.md": TWO}, ".", None, "train", "must name one of its subsets: main, other"),
    "clone split": (CLONE, ".", "main", "validation", "has no split validation; those it has: train, test"),
    "incomplete clone": ({"README.md": README}, ".", None, "train", "names data/train-* for split train, and no file"),
    "outside": ({"README.md": STRANGE.format("../*.jsonl")}, ".", None, "train", "files as '../*.jsonl', which is no path"),
    "absolute": ({"README.md": STRANGE.format("/etc/*.csv")}, ".", None, "train", "files as '/etc/*.csv', which is no path"),
    "files by split": ({"README.md": STRANGE.format("{train: a}")}, ".", None, "train", "as [{'train': 'a'}], which"),
    "a number": ({"README.md": STRANGE.format("7")}, ".", None, "train", "'path': [7]}], which"),
    "head": ({"README.md": "---\na: [\n---\n", "a.jsonl": "a"}, ".", None, "train", "head of its README.md is not YAML"),
    "missing part": (SHARDS, ".", None, "train", "holds 2 of 3 parts of train; fetch the others, or name the files"),
    "missing part of a clone": ({**CLONE, **PART}, ".", None, "train", "holds 1 of 2 parts of train; fetch the others"),
    "pointers": ({"a.jsonl": "version https://git-lfs.github.com/spec/v1\n"}, ".", None, "train", "a pointer of Git LFS"),
    "in one of them": ({"a.jsonl": "a", "b.jsonl": "ab" * 9 + "\n"}, ".", None, "train", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clear_is_refused(case, tmp_path):
    files, path, subset, split, problem = REFUSED[case]
    fill(tmp_path, **files)
    if case == "in one of them":
        (tmp_path / "b.jsonl").write_text(lines("b") + "{\n")
        problem = f"{tmp_path}/b.jsonl:2: not JSON"
    with pytest.raises(UserError) as caught:
        prompts(f"{tmp_path}/{path}", subset, split)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_to_folders_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", **{"a.jsonl": "a"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    assert prompts(tmp_path / "data") == "a"
    (tmp_path / "again").symlink_to(tmp_path / "data")
    assert prompts(tmp_path / "again") == "a"


@contextlib.contextmanager
def as_nobody():
    """Without the privileges of root, which may read everything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())


@pytest.mark.parametrize(
    ("locked", "path", "problem"),
    [
        ("a/a.jsonl", "a/a.jsonl", "a/a.jsonl: Permission denied"),
        ("a/b.jsonl", "a", "a/b.jsonl: Permission denied"),
        ("a/c", "a", "a/c: Permission denied"),
        ("a", "a/*.jsonl", "a/*.jsonl: Permission denied"),
        ("a/c", "a/**/*.jsonl", "a/c/: Permission denied"),
        ("a/c", "a/c/d.jsonl", "a/c/d.jsonl: Permission denied"),
        ("a/c", "a/c/d", "a/c/d: Permission denied"),
        ("a", "a", "a: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_said(locked, path, problem, monkeypatch):
    """It is never left out."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), **{"a__a.jsonl": "a", "a__b.jsonl": "b", "a__c__d.jsonl": "c"})
        if locked != "a/c":
            shutil.rmtree(Path(folder, "a", "c"))
        Path(folder).chmod(0o755)
        monkeypatch.chdir(folder)
        Path(folder, locked).chmod(0)
        try:
            with as_nobody(), pytest.raises(UserError) as caught:
                prompts(path)
        finally:
            Path(folder, locked).chmod(0o755)
    assert f"data {problem}" in str(caught.value)


def saved(folder, **splits):
    made = {
        name: datasets.Dataset.from_list([json.loads(line) for line in lines(*values).splitlines()])
        for name, values in splits.items()
    }
    (made["train"] if len(made) == 1 else datasets.DatasetDict(made)).save_to_disk(folder)
    return folder


def test_saved_data_sets(tmp_path):
    one, two = saved(tmp_path / "one", train="abc"), saved(tmp_path / "two", train="ab", test="cd")
    assert prompts(one) == "abc"
    assert (prompts(two), prompts(two, split="test")) == ("ab", "cd")
    assert prompts(two / "test") == "cd"
    shards = tmp_path / "shards"
    data = datasets.Dataset.from_list([{"prompt": name} for name in "abcdefgh"])
    data.shuffle(seed=1).save_to_disk(shards, num_shards=3)
    assert prompts(shards) == "".join(data.shuffle(seed=1)["prompt"])
    for path, split, problem in (
        (two, "validation", "has no split validation; those it has: train, test"),
        (one, "validation", "is one data set without splits, so it has no validation"),
        (two, "train[:1]", r"has no split train\[:1\]; those it has: train, test"),
    ):
        with pytest.raises(UserError, match=problem):
            prompts(path, split=split)
    (two / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001.arrow: No such file"):
        prompts(two)
    (one / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json: names no data files"):
        prompts(one)
    (one / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: "):
        prompts(one)


def test_files_are_named_and_contents_decide_the_digest(tokenizer, tmp_path):
    """The same files elsewhere have the same tokens; other names of files are another order, and other places."""
    first = fill(tmp_path / "first", **{"a.jsonl": "ab", "b.jsonl": ["c", "long " * 99]})

    def samples(path):
        config = builders.config(tmp_path, path, tmp_path).data
        return tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")

    made = samples(first)
    assert made.report.lines() == [
        "1 left out: nothing to learn within data.max_length (b.jsonl:2)",
        "files: a.jsonl, b.jsonl",
    ]
    assert [made.where(number) for number in range(3)] == [
        f"{first}:a.jsonl:1",
        f"{first}:a.jsonl:2",
        f"{first}:b.jsonl:1",
    ]
    alone = samples(fill(tmp_path / "alone", **{"train.jsonl": "a"}))
    assert (alone.report.lines(), alone.where(0)) == (["files: train.jsonl"], f"{tmp_path}/alone:train.jsonl:1")
    second = shutil.copytree(first, tmp_path / "second")
    assert samples(second).digest == made.digest == samples(f"{second}/*.jsonl").digest
    for number in range(20):
        (second / f"c{number:02d}.jsonl").touch()
    assert (
        samples(second)
        .report.lines()[-1]
        .endswith(
            "b.jsonl, c00.jsonl, c01.jsonl, c02.jsonl, c03.jsonl, c04.jsonl, "
            "c05.jsonl, c06.jsonl, c07.jsonl, ... (22 in all)"
        )
    )
    (second / "b.jsonl").rename(second / "0.jsonl")
    renamed = samples(second)
    assert renamed.digest != made.digest
    assert renamed.where(0) == f"{second}:0.jsonl:1"


def test_a_folder_is_trained_on_and_evaluated_by_its_splits(tiny_model, tmp_path):
    """Through the command: files of the test split are not trained on."""
    folder = tmp_path / "data"
    folder.mkdir()
    builders.write_records(folder / "train.jsonl", 30)
    (folder / "test.jsonl").write_text(lines("a") + "{}\n")
    code, said = call("train", write_config(tmp_path, tiny_model, folder))
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith(f"liftdist: {folder}/test.jsonl:2: ")
    code, said = call("train", write_config(tmp_path, tiny_model, folder), "data.eval_split=validation")
    assert said == f"liftdist: data {folder}: has no split validation; those it has: test, train\n"


@pytest.mark.parametrize(
    ("files", "word", "is_refused"),
    [
        (["a.jsonl"], "data.path=a.jsonl data.split=test", True),
        (["a.jsonl"], "data.path=*.jsonl data.split=validation", True),
        (["a.jsonl", "b.jsonl"], "data.path=. data.split=test", True),
        (["a.jsonl"], "data.eval_split=train data.eval_path=a.jsonl data.path=a.jsonl", True),
        (["a.jsonl.gz"], "data.path=a.jsonl.gz data.split=test", True),
        (["a.jsonl"], "data.path=a.jsonl data.eval_path=a.jsonl data.split=train data.eval_split=test", False),
        (["train.jsonl", "test.jsonl"], "data.path=. data.split=test", False),
        (["train.jsonl", "test.jsonl"], "data.path=. data.split=test data.eval_path=. data.eval_split=train", False),
        (["train.jsonl", "test.jsonl"], "data.path=train.jsonl data.split=test", True),
    ],
)
def test_a_split_of_what_has_none_is_refused(files, word, is_refused, tiny_model, tmp_path, monkeypatch):
    folder = fill(tmp_path / "data", **dict.fromkeys(files, "ab"))
    config = write_config(tmp_path, tiny_model, folder / files[0], data=dict(eval_path=None))
    monkeypatch.chdir(folder)
    code, said = call("select", config, "--prefetch", *word.split())
    assert (code, "has no splits, all of it would be taken; leave data." in said) == (2 * is_refused, is_refused), said
    assert not is_refused or said.count("\n") == 1


def test_what_is_said_of_a_folder_names_the_split(tiny_model, tmp_path):
    folder = fill(tmp_path / "data", **{"train.jsonl": "abc", "test.jsonl": "d"})
    code, said = call("select", write_config(tmp_path, tiny_model, folder), "--prefetch")
    assert code == 0
    assert f"data {folder}, train: 3 samples" in said
    assert f"data {folder}, test: 1 samples" in said
    assert f"data {folder}, test: files: test.jsonl" in said


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["data.path=a.jsonl", "data.path=b.jsonl"],  # what the shell makes of data.path={a,b}.jsonl
         "data.path is given 2 times (a.jsonl, b.jsonl), and one would count; give a folder, or a pattern in quotes: data.path="),
        (["data.eval_path=a", "train.steps=1", "data.eval_path=b"], "data.eval_path is given 2 times (a, b)"),
        (["data/a.jsonl", "data/b.jsonl"], "override 'data/a.jsonl': expected key=value; what the shell takes apart"),
        (["data.path=my", "file.jsonl"], "override 'file.jsonl': expected key=value; what the shell takes apart (blanks, *"),
        (["data.path={a,b}.jsonl"], "data {a,b}.jsonl: no such file"),
        (["data.path=none/*.jsonl"], "data none/*.jsonl: no file matches"),
    ],
)  # fmt: skip
def test_what_the_shell_has_taken_apart(words, problem, tiny_model, records, tmp_path):
    code, said = call("train", write_config(tmp_path, tiny_model, records), *words)
    assert (code, said.count("\n")) == (2, 1), said
    assert problem in said
