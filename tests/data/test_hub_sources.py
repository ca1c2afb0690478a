"""Data sets on a hub on this machine: splits, parts of them, subsets, single files; online and from the cache."""

import gzip
import io
import json
import os
import subprocess
import sys

import datasets
import local_hub
import pyarrow
import pytest
from commands import ROOT
from pyarrow import parquet

DRIVER = """
import json, os, sys
from liftdist.data import sources
from liftdist.errors import UserError
for path, subset, split, revision in json.loads(sys.argv[1]):
    os.environ.pop("LIFTDIST_COMMITS", None)
    try:
        source = sources.open_source(path, subset, split, revision)
        print(json.dumps([[where, record] for where, record in source.read(0, 99)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
FILE = "hf://datasets/o/set"


def lines(*values):
    return "".join(json.dumps({"prompt": value}) + "\n" for value in values).encode()


def table(values, **how):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": values}), buffer, **how)
    return buffer.getvalue()


def pictures():
    features = datasets.Features({"prompt": datasets.Value("string"), "photo": datasets.Image(decode=False)})
    made = datasets.Dataset.from_dict({"prompt": ["a"], "photo": [None]}, features=features)
    buffer = io.BytesIO()
    made.to_parquet(buffer)
    return buffer.getvalue()


CARD = b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: fr\n  data_files: fr.jsonl\n---\n"

CASES = {
    # case: (path, subset, split, revision), what is read, or a part of what is said
    "whole": (("o/set", None, "train", None), "abcde"),
    "slice": (("o/set", None, "train[:2]", None), "ab"),
    "two slices": (("o/set", None, "train[:1]+test", None), "ax"),
    "percent": (("o/set", None, "train[60%:]", None), "de"),
    "from the end": (("o/set", None, "train[-1:]", None), "e"),
    "empty slice": (("o/set", None, "train[9:]", None), "corresponds to no data"),
    "bad slice": (("o/set", None, "train[a:]", None), "data o/set: cannot be read: Unrecognized"),
    "split": (("o/set", None, "dev", None), "data o/set: has no split dev; those it has: train, test"),
    "subset": (("o/two", "fr", "train", None), "f"),
    "which subset": (("o/two", None, "train", None), "data.subset must name one of its subsets: en, fr"),
    "large_string": (("o/large", None, "train", None), "xy"),
    "images": (("o/pictures", None, "train", None), "data o/pictures: column 'photo' holds images, and only text can be learned"),
    "file": ((f"{FILE}/train.jsonl", None, "train", None), "abcde"),
    "file in a folder": ((f"{FILE}/more/b.csv.gz", None, "test", None), "g"),
    "file of a revision": ((f"{FILE}/train.jsonl", None, "train", "v1"), "z"),
    "parquet file": (("hf://datasets/o/large/train.parquet", None, "train", None), "xy"),
    "no file": ((f"{FILE}/none.jsonl", None, "train", None), "data o/set: has no file none.jsonl; see "),
    "no record": ((f"{FILE}/empty.jsonl", None, "train", None), f"data {FILE}/empty.jsonl: holds no record"),
    "bad file": ((f"{FILE}/bad.jsonl", None, "train", None), f"{FILE}/bad.jsonl:2: not JSON"),
    "kind": ((f"{FILE}/README.md", None, "train", None), f"data {FILE}/README.md: must end in .jsonl"),
    "no repository": (("hf://datasets/o/none/a.jsonl", None, "train", None), "data o/none: no such "),
    "revision": ((f"{FILE}/train.jsonl", None, "train", "v9"), "data o/set (revision v9): has no revision v9"),
    "pattern": ((f"{FILE}/*.jsonl", None, "train", None), "names no file on the hub; as hf://datasets/OWNER/NAME/FILE"),
    "a model": (("hf://o/set/train.jsonl", None, "train", None), "names no file on the hub"),
    "split of a file": ((f"{FILE}/train.jsonl", None, "train[:2]", None), "has no split train[:2]: that is for data sets"),
    "subset of a file": ((f"{FILE}/train.jsonl", "en", "train", None), "has no subset en: that is for data sets"),
}  # fmt: skip


def run(folder, url, offline):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([case[0] for case in CASES.values()])],
        env={
            **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with local_hub.serve() as hub:
        hub.put("dataset", "o/set", {"train.jsonl": lines("z")}, ref="v1")
        files = {
            "train.jsonl": lines(*"abcde"),
            "test.jsonl": lines("x"),
            "empty.jsonl": b"\n",
            "bad.jsonl": lines("a") + b"{\n",
        }
        card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        card += b"  - split: test\n    path: test.jsonl\n---\n"
        hub.put("dataset", "o/set", {"README.md": card, **files, "more/b.csv.gz": gzip.compress(b"prompt\ng\n")})
        hub.put("dataset", "o/two", {"README.md": CARD, "en.jsonl": lines("e"), "fr.jsonl": lines("f")})
        large = pyarrow.array(["x", "y"], pyarrow.large_string())
        hub.put("dataset", "o/large", {"train.parquet": table(large)})
        hub.put("dataset", "o/pictures", {"train.parquet": pictures()})
        online = run(folder, hub.url, "0")
        return online, run(folder, hub.url, "1")


def check(said, expected):
    if isinstance(said, str):
        assert expected in said
        assert "\n" not in said
    else:
        assert "".join(record["prompt"] for _, record in said) == expected


@pytest.mark.parametrize("case", CASES)
def test_what_is_on_the_hub(case, found):
    check(found[0][case], CASES[case][1])


@pytest.mark.parametrize("case", [name for name, (_, expected) in CASES.items() if expected.isalpha()])
def test_the_cache_has_the_same(case, found):
    assert found[1][case] == found[0][case]


def test_what_the_cache_has_not_is_said(found):
    assert "data o/set: the hub cannot be reached (HF_HUB_OFFLINE" in found[1]["no file"]
    assert found[0]["file"][1][0] == f"{FILE}/train.jsonl:2"
