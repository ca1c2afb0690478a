"""The part of a model that a text passes through: its decoder. Found by structure, for any Hugging Face model or plain module.

model
  decoder           tokens -> hidden states: embedding, lists of layers, norm
  head              hidden states -> logits
  towers            what is left: encoders of images or sound, their projectors, and layers that attend to what they encode
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

#: Names and classes of modules inside a decoder that encode images or sound, attend to what is encoded, or read that alone.
_ENCODES = re.compile("vision|audio|Vision|Audio|Perceiver|CrossAttention")


def text_decoder(model: nn.Module) -> nn.Module:
    """The module that maps tokens to hidden states; the model itself if it names none by ``get_decoder``."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    if _is_model(model) and not any(isinstance(part, nn.ModuleList) for part in inner.modules()):
        inner = model.base_model  # some heads are named decoders
    if inner is not model:
        return text_decoder(inner)
    if output_head(model) is not None:  # a causal model that names itself
        return next((child for child in model.children() if _is_model(child)), model)
    return model


def towers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with parameters that no text passes through."""
    decoder = text_decoder(model)
    needed = {decoder}
    for part in ("get_input_embeddings", "get_output_embeddings"):
        try:
            needed.add(getattr(model, part)())
        except (AttributeError, NotImplementedError):  # a plain module, or a name that transformers does not know
            continue

    def outside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in needed:
                continue
            if needed & set(child.modules()):
                yield from outside(child)
            elif any(True for _ in child.parameters()):
                yield child

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        for name, child in module.named_children():
            is_apart = _ENCODES.search(type(child).__name__) or _ENCODES.search(name)
            if is_apart or any(_is_model(part) for part in child.modules()):
                yield child
            else:
                yield from inside(child)

    return [*(inside(decoder) if _is_model(decoder) else ()), *(outside(model) if decoder is not model else ())]


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers of the decoder, outermost ones only; a layer has modules of its own, unlike an entry of a list of
    matrices."""

    def lists(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if child in apart:
                continue
            if isinstance(child, nn.ModuleList) and any(True for layer in child for _ in layer.children()):
                yield child
            else:
                yield from lists(child)

    apart = set(towers(model))
    return list(lists(text_decoder(model)))


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its ``weight [m, n]``: ``nn.Linear``, or ``Conv1D`` of transformers, which is transposed."""
    weight = getattr(module, "weight", None)
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2
    return isinstance(module, nn.Linear) or is_conv1d


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model names one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _is_model(module: nn.Module) -> bool:
    return hasattr(module, "get_input_embeddings")
