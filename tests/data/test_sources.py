"""The kinds of files that hold records."""

import json

import builders

from liftdist.data import tokenised


def test_sources_agree(tokenizer, tmp_path):
    import pandas

    lines = [json.loads(line) for line in builders.write_records(tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=1))
    pandas.DataFrame(lines).to_parquet(tmp_path / "a.parquet")
    tables = []
    for suffix in ("jsonl", "json", "parquet"):
        path = tmp_path / f"a.{suffix}"
        config = builders.config(tmp_path, path, tmp_path).data
        tables.append(tokenised.tokenise(str(path), config, tokenizer, 49152, tmp_path / "cache").table[:])
    assert tables[0] == tables[1] == tables[2]
