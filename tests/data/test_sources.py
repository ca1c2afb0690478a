"""Where records come from, how much of a file is read, and when it is hashed."""

import gzip
import hashlib
import json

import builders
import datasets
import pytest

from liftdist import digests
from liftdist.data import records, sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.data_settings import DataConfig


def test_sources_agree(tokenizer, tmp_path):
    """The same records have the same tokens in whatever files they are."""
    import pandas

    text = builders.write_records(tmp_path / "a.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    table = pandas.DataFrame(lines)
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=1))
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(text.encode()))
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.to_csv(tmp_path / "a.tsv.xz", sep="\t", index=False)
    datasets.Dataset.from_pandas(table).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(lines)).save_to_disk(
        tmp_path / "dict", num_shards={"train": 3}
    )
    for number in range(3):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / f"part-{number}.jsonl").write_text(
            "".join(text.splitlines(keepends=True)[number * 15 : number * 15 + 15])
        )
    tables = {}
    for name in (
        "jsonl",
        "json",
        "ndjson.gz",
        "parquet",
        "csv",
        "tsv.xz",
        "saved",
        "dict",
        "folder",
        "folder/part-*.jsonl",
    ):
        path = tmp_path / (f"a.{name}" if (tmp_path / f"a.{name}").exists() else name)
        config = builders.config(tmp_path, path, tmp_path).data
        samples = tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")
        tables[name] = samples.table[:]
    assert len(tables["jsonl"]["input_ids"]) == 40
    assert [name for name in tables if tables[name] != tables["jsonl"]] == []


def test_the_first_records_are_there_without_reading_the_rest(tmp_path, monkeypatch):
    """The whole file was hashed and indexed before its first record was looked at."""
    line = json.dumps({"prompt": "a" * 100, "completion": "b"}) + "\n"
    path = tmp_path / "large.jsonl"
    path.write_text(line * 20_000)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: 1 / 0)
    source = sources.JsonlSource(path)
    assert len(list(source.read(0, 10))) == 10
    assert len(source._marks) == 1
    records.check_first_records(builders.config(tmp_path, path, tmp_path).data)
    assert len(source) == 20_000
    assert len(source._marks) == 20  # memory does not grow with the number of records
    assert [where for where, _ in source.read(19_998, 20_005)] == [f"{path}:19999", f"{path}:20000"]


@pytest.mark.parametrize(
    ("settings", "training", "held_out"),
    [
        (
            dict(path="o/a", subset="x", revision="v1", eval_path="o/a"),
            ("o/a", "x", "train", "v1"),
            ("o/a", "x", "test", "v1"),
        ),
        (dict(path="o/a", subset="x", eval_path="o/b"), ("o/a", "x", "train", None), ("o/b", None, "test", None)),
        (dict(path="o/a", eval_path="o/a", eval_subset="y"), ("o/a", None, "train", None), ("o/a", "y", "test", None)),
        (
            dict(path="o/a", subset="x", eval_path="o/a", eval_subset="y", eval_split="dev", eval_revision="v2"),
            ("o/a", "x", "train", None),
            ("o/a", "y", "dev", "v2"),
        ),
        (
            dict(path="o/a", subset="x", revision="v1", eval_path="a.csv"),
            ("o/a", "x", "train", "v1"),
            ("a.csv", None, "test", None),
        ),
        (
            dict(path="hf://datasets/o/a/train.csv", revision="v1", eval_path="hf://datasets/o/a/b/test.csv"),
            ("hf://datasets/o/a/train.csv", None, "train", "v1"),
            ("hf://datasets/o/a/b/test.csv", None, "test", "v1"),
        ),
        (
            dict(path="hf://datasets/o/a/train.csv", revision="v1", eval_path="hf://datasets/o/b/train.csv"),
            ("hf://datasets/o/a/train.csv", None, "train", "v1"),
            ("hf://datasets/o/b/train.csv", None, "test", None),
        ),
    ],
)
def test_where_data_is(settings, training, held_out):
    """Revision and subset of the training data are the held-out data's, too, where both are one repository."""

    def locations(config):
        return [(source.path, source.subset, source.split, source.revision) for source in config.all_sources]

    assert locations(DataConfig(**settings)) == [training, held_out]
    assert locations(DataConfig(**settings | dict(eval_path=None))) == [training]


def test_a_file_is_hashed_once_until_it_changes(tmp_path):
    path = builders.write_records(tmp_path / "a.jsonl")
    hashed = []

    def beat(*_):
        hashed.append(1)

    first = digests.of_file(path, tmp_path / "cache", beat)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    sources.remember_digests(builders.config(tmp_path, path, tmp_path).data, tmp_path / "cache", beat)
    again = sources.open_source(str(path), None, "train")
    again.watch(beat)
    assert again.digest(tmp_path / "cache") == first
    assert hashed == [1]
    path.write_text(path.read_text() * 2)
    assert digests.of_file(path, tmp_path / "cache") != first
