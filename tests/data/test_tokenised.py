"""Records as tokens: cut or dropped where they are too long, and kept by their contents."""

import json

import builders
import pytest

from liftdist.data import tokenised
from liftdist.data.chat import Encoder
from liftdist.errors import UserError


def samples_of(lines, tokenizer, tmp_path, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    config = builders.config(tmp_path, path, tmp_path, data=settings).data
    return tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")


def test_a_conversation_the_template_refuses_is_named(tokenizer, tmp_path):
    import copy

    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
    line = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(UserError, match=r"data.jsonl:1: the chat template refuses .*System role not supported"):
        samples_of([line], picky, tmp_path)


def test_a_token_outside_the_embedding_is_an_error(tokenizer, tmp_path):
    path = builders.write_records(tmp_path / "r.jsonl")
    config = builders.config(tmp_path, path, tmp_path)
    with pytest.raises(UserError, match=r"r.jsonl:1: token id \d+ is outside the model's 20 embeddings"):
        tokenised.tokenise(config.data.training_sources[0], config.data, Encoder(tokenizer), 20, tmp_path / "cache")


def test_overlong_samples_are_cut_or_dropped_and_counted(tokenizer, tmp_path):
    long = {"prompt": "a", "completion": " b" * 100}
    masked = {"prompt": "a" * 300, "completion": "b"}
    lines = [builders.RECORDS["prompt_completion"], long, masked]
    cut = samples_of(lines, tokenizer, tmp_path, max_length=32)
    assert (len(cut), cut.lengths.max()) == (2, 32)
    assert cut.report.lines() == [f"1 {tokenised.TRUNCATED} (2)", f"1 {tokenised.CUT_OFF} (3)"]
    dropped = samples_of(lines, tokenizer, tmp_path, max_length=32, overlong="drop")
    assert len(dropped) == 1
    assert dropped.report.lines() == [f"2 {tokenised.TOO_LONG} (2, 3)"]
    with pytest.raises(
        UserError, match=r"of 1 records 1 left out: nothing to learn within data.max_length \(1\); raise"
    ):
        samples_of([masked], tokenizer, tmp_path, max_length=8)


def test_tokens_are_cached_by_content(tokenizer, tmp_path, monkeypatch):
    first = samples_of([builders.RECORDS["prompt_completion"]], tokenizer, tmp_path)
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("tokenised again"))
    assert samples_of([builders.RECORDS["prompt_completion"]], tokenizer, tmp_path).table[:] == first.table[:]
    with pytest.raises(pytest.fail.Exception):
        samples_of([builders.RECORDS["alpaca"]], tokenizer, tmp_path)
