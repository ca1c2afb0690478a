import json

import builders
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftdist.data import records, tokenised
from liftdist.data.batches import collate
from liftdist.data.chat import encode
from liftdist.data.order import BatchOrder, epoch_sequences, split_micro_batches
from liftdist.errors import UserError
from liftdist.registry import FORMATS


def write_records(path, count=40):
    lines = [
        {"prompt": f"{a} plus {b} is", "completion": f" {a + b}" * (1 + a % 3)} for a in range(8) for b in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
    return path


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def learned_text(content, tokenizer):
    ids, learned = encode(content, tokenizer)
    return tokenizer.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])


def samples_of(lines, tokenizer, tmp_path, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    config = builders.config(tmp_path, path, tmp_path, data=settings).data
    return tokenised.tokenise(str(path), config, tokenizer, 49152, tmp_path / "cache")


RECORDS = {
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "prompt_completion": {"prompt": "1+2=", "completion": "3"},
    "messages": {"messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1+2"}, {"from": "gpt", "value": "3"}]},
}


@pytest.mark.parametrize("name", RECORDS)
def test_formats_learn_the_response_and_the_end_only(name, tokenizer):
    assert records.detect_format(RECORDS[name]) == name
    text = learned_text(FORMATS.load(name).read(RECORDS[name]), tokenizer)
    assert (
        text.rstrip("\n") == "3<|im_end|>"
    )  # pad and end are the same token here, and the end is learned all the same
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_alpaca_wording():
    prompt, response = FORMATS.load("alpaca").read(RECORDS["alpaca"])
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    prompt, _ = FORMATS.load("alpaca").read(
        {"instruction": "Add.", "output": "3", "answer": "3"}
    )  # LLM-Adapters' extra field
    assert "Input" not in prompt
    assert response == "3"


def test_every_turn_of_the_assistant_is_learned(tokenizer):
    turns = [("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned_text(messages, tokenizer).replace("\n", "") == "one<|im_end|>two<|im_end|>"


def test_a_conversation_the_template_refuses_is_named(tokenizer, tmp_path):
    import copy

    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}"
    line = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(UserError, match=r"data.jsonl:1: the chat template refuses .*System role not supported"):
        samples_of([line], picky, tmp_path)


def test_an_opening_by_the_assistant_is_not_learned(tokenizer):
    turns = [("assistant", "hello"), ("user", "1+2"), ("assistant", "3")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert learned_text(messages, tokenizer).rstrip() == "3<|im_end|>"


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
    good = json.dumps(RECORDS["prompt_completion"])
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    config = builders.config(tmp_path, path, tmp_path)
    with pytest.raises(UserError, match=problem):
        records.check_first_records(config.data)
    with pytest.raises(UserError, match=problem):
        tokenised.tokenise(str(path), config.data, tokenizer, 49152, tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "holds no record"), ("\n \n", "holds no record"), ('{"question": "a"}\n', "fields question fit no format")],
)
def test_bad_files(content, problem, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        records.check_first_records(builders.config(tmp_path, path, tmp_path).data)


def test_a_token_outside_the_embedding_is_an_error(tokenizer, tmp_path):
    path = write_records(tmp_path / "r.jsonl")
    config = builders.config(tmp_path, path, tmp_path)
    with pytest.raises(UserError, match=r"r.jsonl:1: token id \d+ is outside the model's 20 embeddings"):
        tokenised.tokenise(str(path), config.data, tokenizer, 20, tmp_path / "cache")


def test_overlong_samples_are_cut_or_dropped_and_counted(tokenizer, tmp_path):
    long = {"prompt": "a", "completion": " b" * 100}
    masked = {"prompt": "a" * 300, "completion": "b"}
    lines = [RECORDS["prompt_completion"], long, masked]
    cut = samples_of(lines, tokenizer, tmp_path, max_length=32)
    assert (len(cut), cut.truncated, cut.dropped, cut.lengths.max()) == (2, 2, 1, 32)
    dropped = samples_of(lines, tokenizer, tmp_path, max_length=32, overlong="drop")
    assert (len(dropped), dropped.truncated, dropped.dropped) == (1, 0, 2)
    with pytest.raises(UserError, match="nothing to learn"):
        samples_of([masked], tokenizer, tmp_path, max_length=8)


def test_sources_agree(tokenizer, tmp_path):
    import pandas

    lines = [json.loads(line) for line in write_records(tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=1))
    pandas.DataFrame(lines).to_parquet(tmp_path / "a.parquet")
    tables = []
    for suffix in ("jsonl", "json", "parquet"):
        path = tmp_path / f"a.{suffix}"
        config = builders.config(tmp_path, path, tmp_path).data
        tables.append(tokenised.tokenise(str(path), config, tokenizer, 49152, tmp_path / "cache").table[:])
    assert tables[0] == tables[1] == tables[2]


def test_tokens_are_cached_by_content(tokenizer, tmp_path, monkeypatch):
    first = samples_of([RECORDS["prompt_completion"]], tokenizer, tmp_path)
    monkeypatch.setattr(tokenised, "encode", lambda *_: pytest.fail("tokenised again"))
    assert samples_of([RECORDS["prompt_completion"]], tokenizer, tmp_path).table[:] == first.table[:]
    with pytest.raises(pytest.fail.Exception):
        samples_of([RECORDS["alpaca"]], tokenizer, tmp_path)


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1, 101)
    order, starts = epoch_sequences(lengths, 5, False, 64, 2)
    again, _ = epoch_sequences(lengths, 5, False, 64, 2)
    other, _ = epoch_sequences(lengths, 5, False, 64, 3)
    assert (order == again).all()
    assert (order != other).any()
    assert sorted(order) == list(range(100))
    assert len(starts) == 101


def test_batches_cover_every_epoch_once_on_any_number_of_ranks():
    lengths = np.random.default_rng(0).integers(5, 60, 53)
    order = BatchOrder(lengths, 1, True, 128, 8)
    steps, consumed, seen, batches = order.steps(3), 0, [], []
    for _ in range(steps):
        batch = order.batch(consumed, 3)
        consumed += len(batch)
        batches.append(batch)
        seen += [sample for sequence in batch for sample in sequence]
    assert order.batch(consumed, 3) == []
    assert sorted(seen) == sorted(list(range(53)) * 3)
    assert all(sum(lengths[s] for s in sequence) <= 128 for batch in batches for sequence in batch)
    assert all(len(batch) == 8 for batch in batches[:-1])
    resumed = BatchOrder(lengths, 1, True, 128, 8)  # the consumed count is the whole state
    assert resumed.batch(8 * (steps - 2), 3) == batches[-2]
    for ranks in (1, 2, 3, 4, 7):
        dealt = [split_micro_batches(batches[0], lengths, rank, ranks, 2) for rank in range(ranks)]
        assert len({len(micro) for micro in dealt}) == 1  # every rank runs as many micro-batches
        together = [sequence for rank in dealt for micro in rank for sequence in micro]
        assert sorted(together) == sorted(batches[0])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_packed_samples_do_not_see_each_other(model_type, tmp_path, smollm2, tokenizer):
    """Losses of a packed sequence are those of its samples alone."""
    from liftdist.training.loss import token_losses

    folder = builders.llama(tmp_path / "model", smollm2, model_type, sliding_window=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    path = write_records(tmp_path / "r.jsonl", 6)
    config = builders.config(folder, path, tmp_path).data
    samples = tokenised.tokenise(str(path), config, tokenizer, 49152, tmp_path / "cache")
    with torch.no_grad():
        alone = sum(token_losses(model, collate(samples, [[i]])).item() for i in range(6))
        packed = token_losses(model, collate(samples, [[0, 1, 2], [3], [4, 5]])).item()
        padded = token_losses(model, collate(samples, [[i] for i in range(6)])).item()
        empty = token_losses(model, collate(samples, [])).item()
    assert packed == pytest.approx(alone, rel=1e-5)
    assert padded == pytest.approx(alone, rel=1e-5)
    assert empty == 0.0
