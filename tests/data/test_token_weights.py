"""Weights of tokens from a field of the data, as spans of characters of the response."""

import json

import builders
import pytest
import torch
from commands import call, write_config

from liftdist.console import Console
from liftdist.data import tokenised
from liftdist.data.batches import collate
from liftdist.data.chat import Encoder
from liftdist.data.tokenised import IGNORED
from liftdist.data_settings import DataConfig, SourceConfig
from liftdist.errors import UserError
from liftdist.training import objective
from liftdist.training.inputs import prepare_inputs

RECORDS = {
    "prompt_completion": {"prompt": "two plus two", "completion": " is surely four, no doubt"},
    "alpaca": {"instruction": "Add.", "output": " is surely four, no doubt"},
    "lift_paper": {"instruction": "Add.", "output": " is surely four, no doubt"},
    "text": {"text": " is surely four, no doubt"},
    "question_answer": {"question": "two plus two?", "answer": "is surely four, no doubt"},
    "instruction_response": {"instruction": "two plus two?", "response": "is surely four, no doubt"},
    "prompt_response": {"prompt": "two plus two?", "response": " is surely four, no doubt", "history": [["a", "four"]]},
    "worded": {"q": "two plus two", "a": " is surely four, no doubt"},
}


def written(folder, *records):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokenise(tokenizer, folder, *records, **settings):
    config = DataConfig(path=str(written(folder, *records)), token_weights="w", max_length=200)
    for name, value in settings.items():
        setattr(config, name, value)
    return tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, folder / "cache")


def of_words(tokenizer, row):
    """The weight of each learned token, by its text."""
    weights = row["weights"] or [1.0] * len(row["labels"])
    pairs = zip(row["labels"], weights, strict=True)
    return [(tokenizer.decode([label]), weight) for label, weight in pairs if label != IGNORED]


@pytest.mark.parametrize("format", RECORDS)
def test_a_span_weighs_the_tokens_of_its_characters(format, tokenizer, tmp_path):
    record = RECORDS[format]
    response = next(value for value in record.values() if "surely" in value)
    begin, end = response.index("surely"), response.index("four")
    spans = [[begin + 7, end + 4, 2.5], [begin, begin + 6, 0]]
    settings = {"format": format}
    if format == "worded":
        settings = {"prompt_template": "{q}?", "response_template": "{a}"}
    samples = tokenise(tokenizer, tmp_path, {**record, "w": spans}, {**record, "w": None}, **settings)
    assert samples.report.counts[tokenised.WEIGHTED] == 1
    (weighted, plain) = (samples.table[number] for number in (0, 1))
    assert plain["weights"] is None
    assert plain["input_ids"] == weighted["input_ids"]
    found = of_words(tokenizer, weighted)
    without = [word for word, _ in of_words(tokenizer, plain)]
    assert [word for word, _ in found] == [word for word in without if word != " surely"]
    assert " surely" in without
    assert {word: weight for word, weight in found if weight != 1} == {" four": 2.5}
    assert samples.learned.tolist() == [len(found), len(without)] or format == "text"


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([[1, 3, 2.0]], {" is": 2.0}),
        ([[0, 3, 2.0]], {" is": 2.0}),
        ([[0, 1, 2.0]], {}),  # the blank that a token begins with does not count
        ([[1, 2, 3.0]], {" is": 3.0}),  # the larger of 3 and 1
        ([[1, 2, 0.5]], {}),
        ([[1, 2, 0.5], [2, 3, 0.25]], {" is": 0.5}),
        ([[4, 10, 0.5], [1, 3, 0.0]], {" surely": 0.5, " is": None}),
        ([[0, 25, 0.5]], None),
    ],
)
def test_a_token_has_the_largest_weight_of_its_characters(spans, expected, tokenizer, tmp_path):
    samples = tokenise(tokenizer, tmp_path, {**RECORDS["prompt_completion"], "w": spans})
    found = of_words(tokenizer, samples.table[0])
    if expected is None:  # all of the response, but not the end of the sequence
        assert [weight for _, weight in found] == [0.5] * (len(found) - 1) + [1.0]
    else:
        assert {word: weight for word, weight in found if weight != 1} == {k: v for k, v in expected.items() if v}
        assert all(word not in dict(found) for word, weight in expected.items() if weight is None)


@pytest.mark.parametrize(
    ("record", "settings", "problem"),
    [
        ({"w": [[0, 26, 1]]}, {}, "records.jsonl:1: 'w': [0, 26, 1] is no span of the response, which has 25 characters"),
        ({"w": [[3, 3, 1]]}, {}, "records.jsonl:1: 'w': [3, 3, 1] is no span"),
        ({"w": [[0.5, 3, 1]]}, {}, "is no span"),
        ({"w": [[-1, 3, 1]]}, {}, "is no span"),
        ({"w": [[0, 3, -1]]}, {}, "a weight must be finite and at least 0"),
        ({"w": [[0, 3, "x"]]}, {}, "must be two positions and a number"),
        ({"w": [[0, 3, True]]}, {}, "must be two positions and a number"),
        ({"w": [[0, 3, 2], [2, 4, 1]]}, {}, "two spans hold character 2"),
        ({"w": [[0, 3]]}, {}, "must be a list of [begin, end, weight]"),
        ({"w": 0.5}, {}, "must be a list of [begin, end, weight]"),
        ({"w": "0 3 1"}, {}, "must be a list of [begin, end, weight]"),
        ({}, {}, "field 'w' (data.token_weights) is missing (fields: prompt, completion)"),
        ({"messages": [{"role": "assistant", "content": "a"}], "w": []}, {"format": "messages"}, "these records have none"),
        ({"w": []}, {"prompt_template": "{prompt}", "response_template": "{completion}!"}, "data.token_weights=w: weights"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "w": []},
            {},
            "weights, which are of a response that is one text",
        ),
        ({"instruction": "a", "output": "b</s>c", "w": [[0, 1, 2]]}, {"format": "lift_paper"}, "changes the response"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_used_are_refused(record, settings, problem, tokenizer, tmp_path):
    record = record if {"messages", "output"} & record.keys() else {**RECORDS["prompt_completion"], **record}
    with pytest.raises(UserError) as caught:
        tokenise(tokenizer, tmp_path, record, **settings)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_changes_the_reply_is_refused(tokenizer, tmp_path):
    encoder = Encoder(
        tokenizer, template=tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    )
    assert "upper" in encoder.template
    config = DataConfig(
        path=str(written(tmp_path, {**RECORDS["question_answer"], "w": [[0, 2, 3]]})), token_weights="w"
    )
    with pytest.raises(UserError, match=r"records.jsonl:1: the chat template"):
        tokenised.tokenise(config.training_sources[0], config, encoder, 49152, tmp_path / "cache")


def test_weights_are_of_one_source_and_not_of_held_out_data(tiny_model, tmp_path):
    record = RECORDS["prompt_completion"]
    weighted = written(tmp_path, *({**record, "prompt": f"{n}", "w": [[1, 3, 4.0]]} for n in range(4)))
    plain = builders.write_records(tmp_path / "plain.jsonl", 3)
    config = builders.config(tiny_model, plain, tmp_path)
    config.data.path = None
    config.data.sources = [SourceConfig(path=str(weighted), token_weights="w"), SourceConfig(path=str(plain))]
    inputs = prepare_inputs(config, Console(False))
    batch = collate(inputs.samples, [[0, 4], [5]])
    assert batch["weights"].shape == batch["labels"].shape
    assert sorted(set(batch["weights"].flatten().tolist())) == [1.0, 4.0]
    assert (batch["weights"][0] == 4).sum() == 1
    assert "weights" not in collate(inputs.samples, [[4], [5]])
    config = builders.config(tiny_model, weighted, tmp_path, data=dict(token_weights="w", eval_path=str(plain)))
    assert prepare_inputs(config, Console(False)).held_out["plain"].table[0]["weights"] is None


def test_the_command_shows_them(tiny_model, tmp_path):
    path = written(tmp_path, {**RECORDS["prompt_completion"], "w": [[1, 3, 4.0]]})
    config = write_config(tmp_path, tiny_model, path)
    code, shown = call("data", config, "data.token_weights=w")
    assert code == 0
    assert "hold weights of tokens" in shown

    def first_sample(*words):
        """Of what is printed, without what libraries may say besides."""
        lines = call("data", config, "--json", *words)[1].splitlines()
        return json.loads(next(line for line in lines if line.startswith("{")))

    assert first_sample("data.token_weights=w")["weights"].count(4.0) == 1
    assert "weights" not in first_sample()


# ---------------------------------------------------------------------------------------------------------------------
# In the objective.


def test_a_mean_is_a_weighted_mean():
    """By token, by sample and by source; of a row of two packed samples, and one of a third that has no weights."""
    _ = IGNORED
    batch = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
        "labels": torch.tensor([[5, 6, _, 7, _], [5, 6, 7, 8, _]]),
        "weights": torch.tensor([[1.0, 3.0, 9.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]]),
        "sources": torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]),
    }
    weights, divisor = objective.weigh(batch, "token")
    assert weights.tolist() == [[1, 3, 0, 0.5, 0], [1, 1, 1, 1, 0]]
    assert divisor == 8.5
    assert objective.divisors(batch, "token", 2).tolist() == [4.0, 4.5]
    weights, divisor = objective.weigh(batch, "sequence")
    assert weights.tolist() == [[0.25, 0.75, 0, 1, 0], [0.25] * 4 + [0]]
    assert divisor == 3
    assert objective.divisors(batch, "sequence", 2).tolist() == [1, 2]
