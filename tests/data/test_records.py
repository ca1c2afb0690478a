"""Records are recognised, their fields renamed or worded by the user; a bad one is named by file and line."""

import csv
import gzip
import json

import builders
import pyarrow
import pytest
from commands import call, write_config
from pyarrow import parquet

from liftdist.data import records, sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.data.content import Conversation, Text
from liftdist.data_settings import DataConfig
from liftdist.errors import UserError


def write(folder, *lines, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def reader(path, **settings):
    source = sources.open_source(str(path), None, "train")
    return records.reader(source, DataConfig(path=str(path), **settings).training_sources[0]), source


def contents(path, **settings):
    read, source = reader(path, **settings)
    return [records.at(where, read, record) for where, record in source.read(0, 100)]


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
    good = builders.RECORDS["prompt_completion"]
    path = write(tmp_path, good, "", line, good)
    config = builders.config(tmp_path, path, tmp_path)
    with pytest.raises(UserError, match=problem):
        records.check_first_records(config.data)
    with pytest.raises(UserError, match=problem):
        tokenised.tokenise(config.data.training_sources[0], config.data, Encoder(tokenizer), 49152, tmp_path / "cache")


MESSAGES = builders.RECORDS["messages"]["messages"]


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        *((record, name) for name, record in builders.RECORDS.items()),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca"),  # as Stanford's data set has it
        ({"instruction": "a", "output": "b", "answer": "c"}, "alpaca"),  # MATH-10K
        ({"question": "a", "answer": "b", "text": "c"}, "question_answer"),
        ({"text": "a", "meta": {}}, "text"),
        ({"messages": MESSAGES, "prompt": "1+2", "prompt_id": "x"}, "messages"),
        ({"messages": MESSAGES, "conversations": None}, "messages"),  # tables have null for what is absent
        ({"messages": None, "conversations": [{"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"instruction": "a", "output": "b", "question": None, "answer": None}, "alpaca"),
        ({"prompt": "a", "completion": None}, "prompt_completion"),
        ({"conversations": [], "system": "a", "tools": "[]"}, "sharegpt"),
    ],
)
def test_formats_are_recognised(fields, format):
    assert records.detect_format(fields) == format


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"question": "a"},
            "fields question fit no format (known: messages; conversations; instruction/output; prompt/completion;",
        ),
        ({}, "fields none fit no format"),
        (
            {"instruction": "a", "output": "b", "messages": MESSAGES},
            "fit several formats; set data.format to one of messages, alpaca",
        ),
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            "fit several formats; set data.format to one of prompt_completion, prompt_response",
        ),
        (
            {"instruction": "a", "output": "b", "response": "c", "text": "d"},
            "set data.format to one of alpaca, instruction_response",
        ),
        ({"messages": MESSAGES, "conversations": []}, "set data.format to one of messages, sharegpt"),
        (
            {"instruction": None, "output": None, "question": None, "answer": None},
            "set data.format to one of alpaca, question_answer",
        ),
        (
            {"prompt": "a", "picked": "b", "other": "c"},
            "say with data.fields which are which, or give data.prompt_template",
        ),
    ],
)
def test_what_is_not_clear_is_refused(fields, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        contents(write(tmp_path, fields))
    assert f"{tmp_path}/data.jsonl:1: " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["image", "images", "audio", "audios", "video", "videos"])
@pytest.mark.parametrize("format", builders.RECORDS)
def test_images_audio_and_video_are_refused(name, format, tmp_path):
    record = {**builders.RECORDS[format], name: ["x"]}
    with pytest.raises(
        UserError, match=f"data.jsonl:1: the record has '{name}', and only text can be learned; remove the"
    ):
        contents(write(tmp_path, record))
    assert contents(write(tmp_path, {**record, name: []})) == contents(write(tmp_path, {**record, name: None}))
    if format == "question_answer":  # the user's own wording says what is used
        settings = dict(prompt_template="{question}", response_template="{answer}")
        assert contents(write(tmp_path, record), **settings) == [text("1+2", "3")]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_bad_files(content, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no record"):
        records.check_first_records(builders.config(tmp_path, path, tmp_path).data)


def chat(*said):
    return Conversation(
        [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=False)]
    )


def text(prompt, response):
    return Text([(prompt, False), (response, True)])


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        # own names
        ({"query": "1+2", "reply": "3"}, dict(fields={"question": "query", "answer": "reply"}), chat("1+2", "3")),
        ({"query": "1+2", "answer": "3"}, dict(fields={"question": "query"}), chat("1+2", "3")),
        (
            {"prompt": "1+2=", "answer": "3"},
            dict(fields={"completion": "answer"}, format="prompt_completion"),
            text("1+2=", "3"),
        ),
        ({"dialogue": MESSAGES}, dict(fields={"messages": "dialogue"}), Conversation(MESSAGES)),
        ({"body": "a"}, dict(fields={"text": "body"}), Text([("a", True)])),
        (
            {"question": "Sum?", "passage": "1 2", "answer": "3"},
            dict(fields={"context": "passage"}),
            chat("Sum?\n\n1 2", "3"),
        ),
        ({"question": "Sum?", "passage": None, "answer": "3"}, dict(fields={"context": "passage"}), chat("Sum?", "3")),
        (
            {"question": "no", "short question": "1+2", "answer": "3"},
            dict(fields={"question": "short question"}),
            chat("1+2", "3"),
        ),
        (
            {"question": "3", "answer": "1+2"},
            dict(fields={"question": "answer", "answer": "question"}),
            chat("1+2", "3"),
        ),
        (
            {"instruction": "no", "output": "no", "question": "1+2", "answer": "3"},
            dict(format="question_answer"),
            chat("1+2", "3"),
        ),
        # own wording
        (
            {"q": "1+2", "a": "3"},
            dict(prompt_template="Q: {q}\nA:", response_template=" {a}"),
            text("Q: 1+2\nA:", " 3"),
        ),
        ({"question": "1+2", "answer": "3"}, dict(prompt_template="{question}="), text("1+2=", "3")),
        (
            {"query": "1+2", "answer": "3"},
            dict(prompt_template="{query}=", fields={"question": "query"}),
            text("1+2=", "3"),
        ),
        (
            {"instruction": "Add.", "output": "3"},
            dict(prompt_template="{instruction}", format="lift_paper"),
            text("Add.", "3"),
        ),
        (
            {"q": "{a}", "a": "{q}", "my name": "x:y"},
            dict(prompt_template="{q}{my name}{q}", response_template="{a}!"),
            text("{a}x:y{a}", "{q}!"),
        ),
        (
            {"q": "1", "a": "3"},
            dict(prompt_template='{{"q": "{q}"}}{{}}', response_template="{{{a}}}"),
            text('{"q": "1"}{}', "{3}"),
        ),
        ({"q": "1", "a": "3"}, dict(prompt_template="Say it:", response_template="{a}"), text("Say it:", "3")),
        ({"q": "", "a": ""}, dict(prompt_template="{q}", response_template="{a}"), text("", "")),
        (
            {"f(x)": "1", "a": "3"},
            dict(prompt_template="%s $q \\n {f(x)}", response_template="{a}"),
            text("%s $q \\n 1", "3"),
        ),
    ],
)
def test_own_names_and_own_wording(record, settings, expected, tmp_path):
    (made,) = contents(write(tmp_path, record), **settings)
    assert made == expected


@pytest.mark.parametrize(
    ("record", "settings", "problem"),
    [
        (
            {"question": "a", "answer": "b"},
            dict(fields={"question": "query"}),
            "data.jsonl:1: field 'query' (data.fields.question) is missing (fields: question, answer)",
        ),
        (
            {"question": "a", "answer": "b"},
            dict(fields={"qestion": "question"}),
            "data.fields.qestion: is no field of formats; the fields: messages, system, ",
        ),
        ({"q": "a", "answer": "b"}, dict(fields={"question": "q", "output": "answer"}), "fit no format"),
        (
            {"question": "a", "answer": "b"},
            dict(fields={"history": "q"}, format="text"),
            "data.fields.history: is no field of format text; the fields: text",
        ),
        (
            {"q": "a", "a": "b"},
            dict(prompt_template="{q"),
            "data.prompt_template: { in '{q' is no {field}; write {{ and }} for braces",
        ),
        ({"q": "a", "a": "b"}, dict(prompt_template="q}"), "data.prompt_template: } in 'q}' is no {field}"),
        ({"q": "a", "a": "b"}, dict(prompt_template="{}"), "data.prompt_template: {} in '{}' is no {field}"),
        (
            {"q": "a", "a": "b"},
            dict(prompt_template="{q}", response_template="{a}}"),
            "data.response_template: } in '{a}}' is no {field}",
        ),
        (
            {"q": "a", "a": "b"},
            dict(prompt_template="{q}", response_template="a"),
            "data.response_template: has no {field} of a record, so every",
        ),
        ({"q": "a", "a": "b"}, dict(prompt_template="{q}"), "data.jsonl:1: fields q, a fit no format"),
        (
            {"instruction": "a", "output": "b"},
            dict(prompt_template="{instruction}", format="alpaca", fields={"input": "lost", "output": "output"}),
            "data.fields.input: is not used with data.prompt_template, which names the records' own fields; leave it out",
        ),
        (
            {"messages": MESSAGES},
            dict(prompt_template="{messages}"),
            "data.jsonl:1 has no field that is the response; give data.response_template",
        ),
        (
            {"q": "a", "a": "b"},
            dict(prompt_template="{query}", response_template="{a}"),
            "data.jsonl:1: field 'query' of data.prompt_template is missing (fields: q, a); {{ and }} are braces",
        ),
        (
            {"q": None, "a": "b"},
            dict(prompt_template="{q}", response_template="{a}"),
            "field 'q' of data.prompt_template is null",
        ),
        (
            {"q": "a", "a": 7},
            dict(prompt_template="{q}", response_template="{a}"),
            "field 'a' of data.response_template is int, not text",
        ),
    ],
)
def test_names_and_wordings_that_do_not_fit(record, settings, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        contents(write(tmp_path, record), **settings)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "answer": "d", "text": "e"}, {}, ["answer", "text"]),
        ({"instruction": "a", "output": "c", "answer": None}, {}, []),
        ({"messages": MESSAGES, "system": "a", "id": 0}, {}, ["id"]),
        (
            {"question": "a", "answer": "b", "query": "c", "context": "d"},
            dict(fields={"question": "query"}),
            ["question"],
        ),
        ({"instruction": "a", "input": "b", "output": "c", "system": "d"}, dict(format="lift_paper"), ["system"]),
        ({"question": "a", "answer": "b", "context": "c"}, dict(prompt_template="{question}"), ["context"]),
        (
            {"q": "a", "a": "b", "question": "c", "answer": "d"},
            dict(prompt_template="{q}", response_template="{a}"),
            ["question", "answer"],
        ),
        ({"prompt": "a", "completion": "b", "label": True}, {}, ["label"]),
        ({"prompt": "a", "completion": "b", "label": 0}, {}, ["label"]),
        ({"prompt": "a", "completion": "b", "label": "bad"}, {}, ["label"]),
        ({"text": "a", "label": False}, {}, ["label"]),
        ({"q": "a", "a": "b", "label": False}, dict(prompt_template="{q}", response_template="{a}"), ["label"]),
    ],
)
def test_fields_that_do_not_reach_the_tokens_are_known(record, settings, expected, tmp_path):
    read, _ = reader(write(tmp_path, record), **settings)
    assert read.unused(record) == expected


@pytest.mark.parametrize(
    ("record", "settings"),
    [
        ({"prompt": "a", "completion": "b"}, {}),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}),
        ({"messages": MESSAGES}, {}),
        ({"instruction": "a", "input": "b", "output": "c"}, {}),
        ({"q": "a", "answer": "b"}, dict(fields={"question": "q"})),
        ({"question": "a", "answer": "b"}, dict(prompt_template="{question}")),
    ],
)
def test_a_reply_that_is_marked_as_bad_is_not_learned(record, settings, tmp_path):
    path = write(tmp_path, {**record, "label": True}, {**record, "label": False})
    with pytest.raises(
        UserError, match=":2: label is false, which marks a reply that is not to be learned: leave"
    ) as caught:
        contents(path, **settings)
    assert "\n" not in str(caught.value)


def test_what_does_not_reach_the_tokens_is_said_once(tokenizer, tmp_path):
    """Whichever record it is in, and also when the tokens come from the cache."""
    asked, reply = MESSAGES
    turns = [{"messages": [asked, {**reply, **more}], **beside} for more, beside in (
        ({}, {"id": 1}), ({"mood": 3}, {"id": 2}), ({"name": "Al", "weight": 1}, {"id": 3, "source": "x"}),
        ({"mood": None}, {"chat_template_kwargs": {"effort": "low"}}),
    )]  # fmt: skip
    path = write(tmp_path, *turns)
    config = builders.config(tmp_path, path, tmp_path).data
    for _ in range(2):
        samples = tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")
        assert len(samples) == 4
        assert samples.report.lines() == [
            "fields that are not used: id, source",
            "keys that the chat template does not read: mood, name, effort",
        ]
    path = write(tmp_path, {"messages": MESSAGES, "tools": [{"name": "f"}]})
    with pytest.raises(
        UserError, match=r"data.jsonl:1: the chat template does not write the record's tools; leave them"
    ):
        tokenised.tokenise(config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache")
    path = write(tmp_path, builders.RECORDS["alpaca"])
    assert (
        tokenised.tokenise(
            config.training_sources[0], config, Encoder(tokenizer), 49152, tmp_path / "cache"
        ).report.lines()
        == []
    )


def test_nulls_of_a_table_are_not_the_users(tmp_path):
    """A column of a table has the same keys in every row; what a JSON file has as null was meant."""
    import datasets

    def turns(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    rows = [
        {"messages": turns({"x": 1}), "tools": [{"function": {"name": "f", "parameters": {"x": {"type": "int"}}}}]},
        {"messages": turns({"y": [2]}), "tools": [{"function": {"name": "f", "parameters": {"y": {"type": "int"}}}}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    assert datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train", cache_dir=tmp_path
    )[0]["tools"][0]["function"]["parameters"] == {"x": {"type": "int"}, "y": None}
    assert contents(tmp_path / "data.parquet") == contents(write(tmp_path, *rows))
    (made,) = contents(write(tmp_path, {"messages": turns({"x": None})}))
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}


@pytest.mark.parametrize(
    ("line", "override", "problem"),
    [
        ({"q": "a", "a": "b"}, (), "fields q, a fit no format"),
        ({"q": "a", "a": "b"}, ("data.fields.question=q",), "fields a, question fit no format"),
        (
            {"q": "a", "a": "b"},
            ("data.fields={question: qq, answer: a}",),
            "data.jsonl:1: field 'qq' (data.fields.question) is missing",
        ),
        (
            {"q": "a", "a": "b"},
            ("data.prompt_template={q} ", "data.response_template={b}"),
            "field 'b' of data.response_template is missing",
        ),
        ({"q": "a", "a": "b"}, ("data.prompt_template={q",), "data.prompt_template: { in '{q' is no {field}"),
        (
            {"q": "a", "a": "b"},
            ("data.response_template={a}",),
            "data.response_template: needs data.prompt_template, too",
        ),
        (
            {"q": "a", "a": "b"},
            ("data.prompt_template={q}", "data.response_template={a}", "data.format=text"),
            "data.format: is not used with data.prompt_template and data.response_template; leave it out",
        ),
        (
            {"q": "a", "a": "b"},
            ("data.prompt_template={q}", "data.response_template={a}", "data.fields.text=q"),
            "data.fields: is not used with",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            (),
            "data.jsonl:1: turn 1 of 'messages' has a part of type 'image'",
        ),
    ],
)
def test_the_command_says_so_before_anything_starts(line, override, problem, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, write(tmp_path, line))
    code, said = call("train", config, *override)
    assert (code, problem in said) == (2, True), said
    assert len(said.splitlines()) == 1


DEEP = "[" * 100_000 + "]" * 100_000
BIG = '{"a": 1' + "0" * 5000 + "}"
HALF = r'{"name": "\ud800"}'


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("tools", DEEP, "'tools': is nested too deep (more than 100 lists and objects in one another)"),
        ("tools", f"[{BIG}]", "'tools': holds a number of too many digits; write it as text"),
        (
            "tools",
            f"[{HALF}]",
            r"'tools': \ud800 is half of a surrogate pair, which is no text; remove it, or write both halves",
        ),
        ("tools", '[{"name": "f", "x": 1e999}]', "'tools': 1e999 is beyond the largest number; write it as text"),
        ("tools", '[{"name": "f", "x": NaN}]', "'tools': NaN is no JSON; write null"),
        (
            "tools",
            '[{"name": "f", "name": "g"}]',
            "'tools': key 'name' occurs twice in an object, and only one of the two",
        ),
        ("tools", "[{'name': 'f'}]", "'tools': not JSON: "),
        ("chat_template_kwargs", DEEP, "'chat_template_kwargs': is nested too deep"),
        ("chat_template_kwargs", HALF, r"'chat_template_kwargs': \ud800 is half of a surrogate pair"),
    ],
)
def test_json_inside_of_texts_is_read_as_strictly(kind, field, value, problem, tmp_path):
    """In whatever file; it was a traceback where Python's parser gave up."""
    rows = [{"question": "a", "answer": "b", field: text} for text in ("", value)]
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes((gzip.compress if kind.endswith("gz") else bytes)(text.encode()))
    with pytest.raises(UserError) as caught:
        contents(path)
    places = {"parquet": " record 1", "json": " record 1", "csv": "3"}
    assert str(caught.value).startswith(f"{path}:{places.get(kind, '2')}: {problem}")
    assert "\n" not in str(caught.value)
