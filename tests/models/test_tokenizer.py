"""Tokenizers in the forms that model folders have: the same tokens in each, or one line that says what is missing."""

import json
import shutil

import builders
import pytest
from commands import call, write_config
from transformers import AutoTokenizer

from liftdist.data.chat import Encoder
from liftdist.data.content import Text
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models.tokenizer import load_tokenizer

CODE = """
from transformers import PreTrainedTokenizer
class Letters(PreTrainedTokenizer):
    def __init__(self, **more):
        self.letters = {letter: number for number, letter in enumerate("abc")}
        super().__init__(**more)
    vocab_size = property(lambda self: 3)
    def get_vocab(self): return dict(self.letters)
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return self.letters.get(token, 0)
    def _convert_id_to_token(self, number): return "abc"[number]
"""


def folder_of(path, model_type, settings=None, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def load(folder, trust=False):
    return load_tokenizer(folder, ModelConfig(path=str(folder), trust_remote_code=trust))


def learned(tokenizer):
    ((ids, flags),) = Encoder(tokenizer)(Text([("What is 'it'?\n", False), (" It's é日\nfive\n", True)]))
    return tokenizer.convert_ids_to_tokens(ids), flags


@pytest.fixture(scope="module")
def bpe(smollm2):
    """vocab.json and merges.txt of a byte-level BPE, and its special tokens."""
    made = json.loads((smollm2 / "tokenizer.json").read_text())
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in made["model"]["merges"])
    return {
        "vocab__json": json.dumps(made["model"]["vocab"]),
        "merges__txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    }


@pytest.mark.parametrize(
    ("name", "model_type"), [("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen2"), (None, "gpt2")]
)
def test_a_vocabulary_and_merges_make_the_tokens_of_tokenizer_json(name, model_type, bpe, tokenizer, tmp_path):
    settings = {"tokenizer_class": name, "eos_token": "<|im_end|>", "bos_token": None}
    found = learned(load(folder_of(tmp_path, model_type, settings if name else None, **bpe)))
    tokens, flags = learned(tokenizer)
    assert (found[0][:-1], found[1]) == (tokens[:-1], flags)


@pytest.mark.parametrize(
    ("settings", "model_type"),
    [
        *(({"tokenizer_class": name}, kind) for name, kind in (
            ("LlamaTokenizer", "llama"), ("LlamaTokenizerFast", "llama"), ("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen2"),
            ("GemmaTokenizer", "gemma"), ("CodeLlamaTokenizer", "llama"), ("GPTNeoXTokenizer", "gpt_neox"))),
        (None, "qwen2"), (None, "qwen3"), (None, "gpt2"), (None, "gemma3_text"),
    ],
)  # fmt: skip
def test_a_folder_without_a_vocabulary_is_refused(settings, model_type, tmp_path):
    """transformers makes a tokenizer of it that knows no text: only the end of sequence would be learned."""
    folder = folder_of(tmp_path, model_type, settings)
    assert len(AutoTokenizer.from_pretrained(folder)) < 20
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"model.path {folder}: holds no vocabulary of a tokenizer; copy tokenizer.json from where the model is from"
    )


@pytest.mark.parametrize("merges", ["", "#version: 0.2\n"])
def test_a_vocabulary_without_merges_is_refused(merges, bpe, tmp_path):
    """transformers makes a tokenizer of it that cuts every word into letters."""
    folder = folder_of(tmp_path, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, **bpe | {"merges__txt": merges})
    assert AutoTokenizer.from_pretrained(folder).tokenize("Hello") == list("Hello")
    with pytest.raises(
        UserError, match="merges.txt: holds no merges, so that each letter would be a token; copy it, or tok"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "files", "problem"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, "no usable tokenizer: holds none that can be read"),
        (None, {}, "holds none that can be read without its class; copy tokenizer.json"),
        ({"tokenizer_class": "GPT2Tokenizer"}, {"vocab__json": "{}"}, "no usable tokenizer: `vocab` and `merges`"),
        ({"tokenizer_class": "GPT2Tokenizer"}, {"merges__txt": ""}, "no usable tokenizer: `vocab` and `merges`"),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer__json": "{"}, "no usable tokenizer: "),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer__json": ""}, "no usable tokenizer: "),
        (None, {"tekken__json": "{}"}, "no usable tokenizer: "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(settings, files, problem, tmp_path):
    with pytest.raises(UserError) as caught:
        load(folder_of(tmp_path, "llama", settings, **files))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "files", "name"),
    [
        ({"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"}, {}, "ByT5Tokenizer"),
        (
            {"tokenizer_class": "Letters", "auto_map": {"AutoTokenizer": ["own.Letters", None]}},
            {"own__py": CODE},
            "Letters",
        ),
    ],
)
def test_tokenizers_in_python_are_refused_by_name(settings, files, name, tmp_path):
    tokenizer = load(folder_of(tmp_path, "llama", settings, **files), trust=True)
    with pytest.raises(
        UserError, match=f"{name} is a slow tokenizer, which does not say where its tokens stand in the text; save"
    ):
        Encoder(tokenizer)


def sentences():
    return [
        f"{word} is {number} plus {number + 1}, déjà vu."
        for number in range(99)
        for word in ("What", "Hello", "How are you")
    ]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / "m"
    options = dict(
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(prefix),
        minloglevel=2,
        remove_extra_whitespaces=False,
        **options,
    )
    return prefix.with_suffix(".model")


def test_a_sentencepiece_model_is_converted_or_refused(sentencepiece_model, tmp_path):
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = folder_of(tmp_path / "good", "llama", settings)
    shutil.copy(sentencepiece_model, folder / "tokenizer.model")
    tokens, flags = learned(load(folder))
    pieces = own.encode_as_pieces("What is 'it'?\n It's é日\nfive\n")
    assert tokens == [*["<s>"][: len(tokens) - len(pieces) - 1], *pieces, "</s>"]
    assert flags[-2:] == [True, True]
    folder = folder_of(tmp_path / "bad", "mistral", settings | {"tokenizer_class": "LlamaTokenizerFast"})
    shutil.copy(sentencepiece_model, folder / "tokenizer.model")  # which loses the blank before a text
    with pytest.raises(
        UserError,
        match=r"tokenizer.model: transformers makes '2.*' of '2 plus 3 is 5.', and not '▁2.*copy tokenizer.json",
    ):
        load(folder)


def test_a_sentencepiece_model_needs_its_package(monkeypatch, tmp_path):
    folder = folder_of(tmp_path, "llama", {"tokenizer_class": "LlamaTokenizer"}, tokenizer__model="x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="tokenizer.model is read by the package sentencepiece: pip install sentencepiece"
    ):
        load(folder)


def test_records_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from liftdist.data import tokenised

    made = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="?")
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "a", "completion": f" {text}"}) + "\n" for text in ("a", "b", "a", "a z"))
    )
    config = builders.config(tmp_path, path, tmp_path).data
    report = tokenised.tokenise(config.training_sources[0], config, Encoder(fast), 3, tmp_path / "cache").report
    assert report.lines() == [f"2 {tokenised.UNKNOWN} (2, 4)"]


def test_the_command_refuses_a_model_without_its_vocabulary(tiny_model, records, tmp_path):
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    code, said = call("select", write_config(tmp_path, bare, records), "--prefetch")
    assert (code, said.count("\n")) == (2, 1), said
    assert "holds no vocabulary of a tokenizer" in said
