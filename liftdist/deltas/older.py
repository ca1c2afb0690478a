"""Settings files that transformers 4 reads, too: many servers have it, and it ignores what it does not know.

A folder that transformers 5 has saved lacks the older names of some settings. Without them transformers 4.56 refuses the
tokenizer, and loads the model with the default frequencies of its rotary embedding: it runs, and computes something else.
Both versions read what is written here alike, so that an export means the same to each.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of transformers 4.56


def tokenizer_config(settings: Settings) -> Settings:
    """The contents of ``tokenizer_config.json``, with the names of transformers 4."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # an alias of it in transformers 5
    if isinstance(settings.get("extra_special_tokens"), list):  # 4 expects a dict there, and has this name for a list
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def model_config(settings: Settings) -> Settings:
    """The contents of ``config.json``, with ``rope_parameters`` under its older names, too, where they are not given; those of
    its parts, such as ``text_config``, as well."""
    if "auto_map" in settings:  # code of its own reads what it was written with
        return settings
    settings = {
        key: model_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in settings.items()
    }
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return settings
    if set(rope) == {"full_attention", "sliding_attention"}:
        older = _rope(rope["full_attention"]) | {"rope_local_base_freq": rope["sliding_attention"].get("rope_theta")}
    elif any(isinstance(value, dict) for value in rope.values()):
        return settings  # of architectures that transformers 4.56 does not have
    else:
        older = _rope(rope)
    if (older["rope_scaling"] or {}).get("rope_type", "default") not in _ROPE_TYPES:
        return settings
    return settings | {key: value for key, value in older.items() if settings.get(key) is None and value is not None}


def _rope(rope: Settings) -> Settings:
    elsewhere = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in elsewhere}
    plain = rope.get("rope_type", "default") == "default"
    return {key: rope.get(key) for key in elsewhere} | {"rope_scaling": None if plain else scaling}
