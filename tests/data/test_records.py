"""Records that cannot be read are named by file and line."""

import json

import builders
import pytest

from liftdist.data import records, tokenised
from liftdist.data.chat import Encoder
from liftdist.errors import UserError


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "completion": ', r"data.jsonl:3: not JSON"),
        ('{"prompt": "a"}', r"data.jsonl:3: field 'completion' is missing \(fields: prompt\)"),
        ('{"prompt": "a", "completion": null}', r"data.jsonl:3: 'completion' must be text, got null"),
        ('{"prompt": "a", "completion": 7}', r"data.jsonl:3: 'completion' must be text, got int"),
        ("[1, 2]", r"data.jsonl:3: must be a JSON object, got list"),
    ],
)
def test_a_bad_line_is_named(line, problem, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(builders.RECORDS["prompt_completion"])
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    config = builders.config(tmp_path, path, tmp_path)
    with pytest.raises(UserError, match=problem):
        records.check_first_records(config.data)
    with pytest.raises(UserError, match=problem):
        tokenised.tokenise(str(path), config.data, Encoder(tokenizer), 49152, tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "holds no record"), ("\n \n", "holds no record"), ('{"question": "a"}\n', "fields question fit no format")],
)
def test_bad_files(content, problem, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        records.check_first_records(builders.config(tmp_path, path, tmp_path).data)
