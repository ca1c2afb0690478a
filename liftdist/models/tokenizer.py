"""The tokenizer of a model's folder, if it is the one that the model was made with.

transformers makes a tokenizer even of a folder that holds no vocabulary, which knows no text, or no merges, which knows only
letters, and converts what has no ``tokenizer.json``, not always right.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig

_FAST, _SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_OTHERS = ("vocab.json", "vocab.txt", "tekken.json")
_PROBES = ("2 plus 3 is 5.", "Hello, world!\nHow are you?", "déjà vu 日本")


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``. Raises ``UserError`` if there is none, or it is not what the folder's files say."""
    where = f"model.path {folder}"
    is_converted = (folder / _SENTENCEPIECE).is_file() and not (folder / _FAST).is_file()
    if is_converted and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(f"{where}: {_SENTENCEPIECE} is read by the package sentencepiece: pip install sentencepiece")
    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"{where}: no usable tokenizer: {_reason(error)}") from None
    names = {_FAST, _SENTENCEPIECE, *_OTHERS, *made.vocab_files_names.values()}
    if made.is_fast and not any((folder / name).is_file() for name in names):
        raise UserError(f"{where}: holds no vocabulary of a tokenizer; copy {_FAST} from where the model is from")
    merges = folder / made.vocab_files_names.get("merges_file", "merges.txt")
    if made.is_fast and not (folder / _FAST).is_file() and merges.is_file() and not _holds_merges(merges):
        raise UserError(
            f"model.path {merges}: holds no merges, so that each letter would be a token; copy it, or {_FAST}, from where the "
            "model is from"
        )
    if is_converted:
        _check_converted(made, folder / _SENTENCEPIECE)
    return made


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    if lines[0].startswith("Couldn't instantiate"):  # what could be it is a list on the next lines
        return f"holds none that can be read without its class; copy {_FAST} from where the model is from"
    return lines[0]


def _holds_merges(file: Path) -> bool:
    return any(
        line.strip() and not line.startswith("#version") for line in file.read_text(encoding="utf-8").splitlines()
    )


def _check_converted(made: PreTrainedTokenizerBase, file: Path) -> None:
    """Raises ``UserError`` if transformers reads a sentencepiece model otherwise than its library."""
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in _PROBES:
        pieces, expected = made.tokenize(text), own.encode_as_pieces(text)
        if pieces != expected:
            raise UserError(
                f"model.path {file}: transformers makes {' '.join(pieces)[:60]!r} of {text!r}, and not "
                f"{' '.join(expected)[:60]!r}; copy {_FAST} from where the model is from"
            )
