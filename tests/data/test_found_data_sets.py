"""Data sets as they are found on the hub, with a mistake in each: what is learned of them, worked out by hand.

By their fields only: the records are made here.
"""

import json

import builders
import datasets
import pytest
from commands import call, write_config

from liftdist.data import records, sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.errors import UserError

TEMPLATE = (  # of a model that thinks and calls tools
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(*said):
    """What templates write of a role and a text, one after the other."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(said[::2], said[1::2], strict=True))


HEAD = chatml("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def said(*turns, names=("human", "gpt")):
    return [{"from": names[number % 2], "value": text} for number, text in enumerate(turns)]


ALPACA = "Below is an instruction that describes a task, paired with an input that provides further context. "
ALPACA += "Write a response that appropriately completes the request.\n\n"
ALPACA += "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
TOOL = {"name": "area", "description": "of a circle", "parameters": {"radius": {"type": "int", "default": "5"}}}
CALLS = [{"name": "area", "arguments": {"radius": 5}}]
TOOLS = json.dumps([{"type": "function", "function": TOOL}])
THOUGHT = "<think>\nEasy.\n</think>\n\n3"
HERMES_CALL = "<tool_call>\n{'name': 'area'}\n</tool_call>"
HERMES = '<tools>[{"type": "function"}]</tools>'

#: name: (record, further settings, the whole text, the learned texts, what is said besides)
FOUND = {
    "UltraChat": (
        {"prompt": "Hi?", "prompt_id": "f0", "messages": [user("Hi?"), assistant("Yes."), user("So?"), assistant("So.")]},
        {}, HEAD + chatml("user", "Hi?", "assistant", "Yes.", "user", "So?", "assistant", "So."),
        ["Yes.<|im_end|>\n", "So.<|im_end|>\n"], ["fields that are not used: prompt, prompt_id"],
    ),
    "OpenHermes": (
        {"conversations": said("Hi?", "Yes."), "source": "airoboros", "category": None, "id": "7"},
        {}, HEAD + chatml("user", "Hi?", "assistant", "Yes."), ["Yes.<|im_end|>\n"],
        ["fields that are not used: source, id"],
    ),
    "SlimOrca": (
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None},
                           {"from": "human", "value": "Hi?", "weight": 0}, {"from": "gpt", "value": "Yes.", "weight": 1}]},
        {}, chatml("system", "Be brief.", "user", "Hi?", "assistant", "Yes."), ["Yes.<|im_end|>\n"], [],
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "all of it"},
        {}, f"{ALPACA}3<|im_end|>", ["3<|im_end|>"], ["fields that are not used: text"],
    ),
    "GSM8K": (
        {"question": "1+2?", "answer": "1+2 = <<1+2=3>>3\n#### 3"},
        {}, HEAD + chatml("user", "1+2?", "assistant", "1+2 = <<1+2=3>>3\n#### 3"),
        ["1+2 = <<1+2=3>>3\n#### 3<|im_end|>\n"], [],
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "closed_qa"},
        {}, HEAD + chatml("user", "Add.\n\n1 2", "assistant", "3"), ["3<|im_end|>\n"],
        ["fields that are not used: category"],
    ),
    "xLAM": (  # whose calls are the answer, as text
        {"id": 1, "query": "Area of 5?", "answers": json.dumps(CALLS), "tools": json.dumps([TOOL])},
        dict(fields={"question": "query", "answer": "answers"}, chat_template=TEMPLATE),
        chatml("system", TOOLS, "user", "Area of 5?", "assistant", json.dumps(CALLS)),
        [json.dumps(CALLS) + "<|im_end|>\n"], ["fields that are not used: id"],
    ),
    "Hermes function calling": (
        {"conversations": [{"from": "system", "value": HERMES}, *said("Area?", HERMES_CALL),
                           {"from": "tool", "value": "78"}, {"from": "gpt", "value": "It is 78."}], "tools": json.dumps([TOOL])},
        dict(chat_template=TEMPLATE),
        chatml("system", TOOLS, "system", HERMES, "user", "Area?", "assistant", HERMES_CALL, "tool", "78",
               "assistant", "It is 78."),
        [f"{HERMES_CALL}<|im_end|>\n", "It is 78.<|im_end|>\n"], [],
    ),
    "Glaive": (
        {"conversations": [*said("Area?", json.dumps(CALLS[0]), names=("human", "function_call")),
                           *said("78", "It is 78.", names=("observation", "gpt"))], "tools": json.dumps([TOOL])},
        dict(chat_template=TEMPLATE),
        chatml("system", TOOLS, "user", "Area?", "assistant", f"<call>{json.dumps(CALLS[0])}</call>", "tool", "78",
               "assistant", "It is 78."),
        [f"<call>{json.dumps(CALLS[0])}</call><|im_end|>\n", "It is 78.<|im_end|>\n"], [],
    ),
    "OpenR1": (
        {"problem": "1+2?", "uuid": "u", "generations": ["x"], "messages": [user("1+2?"), assistant(THOUGHT)]},
        {}, HEAD + chatml("user", "1+2?", "assistant", THOUGHT), [f"{THOUGHT}<|im_end|>\n"],
        ["fields that are not used: problem, uuid, generations"],
    ),
    "reasoning apart": (
        {"messages": [user("1+2?"), assistant("3", reasoning_content="Easy.")]}, dict(chat_template=TEMPLATE),
        chatml("user", "1+2?", "assistant", "<think>Easy.</think>3"), ["<think>Easy.</think>3<|im_end|>\n"], [],
    ),
    "OpenThoughts": (
        {"system": "Think.", "conversations": said("1+2?", "<|begin_of_thought|>E", names=("user", "assistant"))},
        {}, chatml("system", "Think.", "user", "1+2?", "assistant", "<|begin_of_thought|>E"),
        ["<|begin_of_thought|>E<|im_end|>\n"], [],
    ),
}  # fmt: skip


def encode(path, tokenizer, **settings):
    config = builders.config(path.parent, path, path.parent, data=settings | dict(max_length=4096)).data
    source = sources.open_source(str(path), None, "train")
    rows, report = tokenised.encode_all(
        source.read(0, 9),
        records.reader(source, config.training_sources[0]),
        Encoder(tokenizer, config.chat_template),
        49152,
        config,
    )
    return rows, report.lines()


def pieces(tokenizer, row):
    found, before = [], False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if (is_learned := label != tokenised.IGNORED) and not before:
            found.append([])
        if is_learned:
            found[-1].append(token)
        before = is_learned
    return [tokenizer.decode(piece) for piece in found]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FOUND)
def test_what_is_learned(name, kind, tokenizer, tmp_path):
    record, settings, whole, learned, said_besides = FOUND[name]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list([record]).to_parquet(path)
    else:
        path.write_text(json.dumps(record) + "\n")
    (row,), lines = encode(path, tokenizer, **settings)
    assert tokenizer.decode(row["input_ids"]) == whole
    assert pieces(tokenizer, row) == learned
    assert lines == said_besides


@pytest.mark.parametrize(
    ("name", "mistake", "problem"),
    [
        ("UltraChat", {"messages": [user("Hi?"), {"role": "assisant", "content": "Yes."}]}, "turn 2 of 'messages': role must be"),
        ("UltraChat", {"messages": [user("Hi?"), assistant(None)]}, "turn 2 of 'messages' needs 'content' or 'value', or tool"),
        ("UltraChat", {"messages": [[user("Hi?"), assistant("Yes.")]]}, "turn 1 of 'messages' must be an object with 'role'"),
        ("UltraChat", {"messages": json.dumps([user("Hi?")])}, "'messages' must be a list of turns, got str"),
        ("OpenHermes", {"conversations": said("Hi?")}, "'conversations' has no assistant turn, so there is nothing to train on"),
        ("OpenHermes", {"conversations": [{"role": "human"}]}, "turn 1 of 'conversations' needs 'content' or 'value'"),
        ("SlimOrca", {"conversations": [*said("Hi?"), {"from": "gpt", "value": "Yes.", "weight": 0.5}]}, "'weight' must be 0"),
        ("Alpaca", {"instruction": "Add.", "inputs": "1 2", "outputs": "3"}, "field 'output' is missing (fields: instruction,"),
        ("Alpaca", {"instruction": "Add.", "input": ["1", "2"], "output": "3"}, "'input' must be text, got list"),
        ("GSM8K", {"question": "1+2?", "answer": None}, "'answer' must be text, got null"),
        ("GSM8K", {"question": "1+2?", "answr": "3"}, "field 'answer' is missing (fields: question, answr)"),
        ("Dolly", {"instruction": "Add.", "context": "", "response": 3}, "'response' must be text, got int"),
        ("xLAM", {"query": "a", "answers": "b", "tools": "area(radius)"}, "'tools': not JSON: 'area(radius)'"),
        ("xLAM", {"question": "a", "answers": "b", "tools": "[]"}, "field 'query' (data.fields.question) is missing"),
        ("Hermes function calling", {"conversations": said("a", "b"), "tools": "{}{}"}, "'tools': not JSON: '{}{}'"),
        ("Hermes function calling", {"conversations": said("a", "b"), "tools": '{"a": 1}'}, "'tools' must be a list of objects"),
        ("Glaive", {"conversations": said("a", "area(5)", names=("human", "function_call"))}, "a tool call: not JSON: 'area(5)'"),
        ("OpenR1", {"messages": [user("a"), assistant([{"type": "thinking", "thinking": "E."}])]}, "as 'reasoning_content' of"),
        ("reasoning apart", {"messages": [user("a"), assistant("b", images=["x"])]}, "turn 2 of 'messages' has 'images', and"),
        ("OpenThoughts", {"system": 3, "conversations": said("a", "b")}, "'system' must hold text, got int"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_second_record_is_named(name, mistake, problem, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (FOUND[name][0], mistake)))
    with pytest.raises(UserError) as caught:
        encode(path, tokenizer, **FOUND[name][1])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, "data.fields.response=chosen"),
        ({"system": "s", "prompt": "a", "chosen": " b", "rejected": " c", "score": 7}, "data.fields.response=chosen"),
        ({"system": "s", "question": "a", "chosen": " b", "rejected": " c"}, "data.fields.answer=chosen"),
        ({"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
         "data.fields.messages=chosen"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, "data.fields.messages=chosen"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "data.fields.text=chosen"),
    ],
)  # fmt: skip
def test_preferences_are_refused_with_a_remedy_that_works(record, remedy, tiny_model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    config = write_config(tmp_path, tiny_model, path, data=dict(eval_path=None))
    code, out = call("train", config)
    assert (code, out.count("\n")) == (2, 1), out
    assert f"are preferences, of which nothing is learned by itself; {remedy} learns the chosen ones" in out
    code, out = call(
        "select", config, "--prefetch", remedy, *(["data.format=prompt_completion"] if "completion" in remedy else [])
    )
    assert code == 0, out
    assert "rejected" in out.partition("fields that are not used: ")[2]  # and it is said


def test_subset_and_split_of_a_cloned_data_set(tokenizer, tmp_path):
    """As GSM8K has them: two subsets, each with its own files for each split."""
    clone = tmp_path / "gsm8k"
    for subset in ("main", "socratic"):
        for split in ("train", "test"):
            (clone / subset).mkdir(parents=True, exist_ok=True)
            record = {"question": f"{subset}?", "answer": f"{split} #### 3"}
            datasets.Dataset.from_list([record]).to_parquet(clone / subset / f"{split}-00000-of-00001.parquet")
    (clone / "README.md").write_text(
        "---\nconfigs:\n" + "".join(
            f"- config_name: {subset}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in ("train", "test"))
            for subset in ("main", "socratic")
        ) + "---\n# GSM8K\n"
    )  # fmt: skip
    config = builders.config(tmp_path, clone, tmp_path).data
    for subset, split in (("main", "train"), ("socratic", "test")):
        source = sources.open_source(str(clone), subset, split)
        (row,), _ = tokenised.encode_all(
            source.read(0, 9), records.reader(source, config.training_sources[0]), Encoder(tokenizer), 49152, config
        )
        assert f"user\n{subset}?<|im_end|>" in tokenizer.decode(row["input_ids"])
        assert pieces(tokenizer, row) == [f"{split} #### 3<|im_end|>\n"]
    with pytest.raises(UserError, match="data.subset must name one of its subsets: main, socratic"):
        sources.open_source(str(clone), None, "train")
