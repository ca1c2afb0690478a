"""What a decoder layer keeps from its forward to its backward: all, its input, its products too, and that on the host or not.

The function by which transformers recomputes a layer is called in place of its forward, inside of FSDP's hooks.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from liftdist.errors import UserError
from liftdist.model_settings import SELECTIVE, ModelConfig
from liftdist.models.build import class_name, decoder_layers
from liftdist.models.offload import offloaded

#: Operations whose results are kept by ``selective``: products with weights and fused attention, also of kernels from elsewhere.
#: Products of batches are left out, as they are those of attention that is not fused, with a value for each pair of tokens.
_KEPT = re.compile(r"\b(add)?mm\b|grouped_mm|attention|flash|attn")


def keep(model: PreTrainedModel, config: ModelConfig) -> None:
    """Let the decoder layers of a model keep what the config says. To be called before FSDP shards it.

    Raises:
        UserError: the model's layers cannot.
    """
    asked = f"model.activation_checkpointing={str(config.activation_checkpointing).lower()}"
    if config.activation_checkpointing:  # transformers 5.17 has the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        ways: dict[str, Any] = {"use_reentrant": False}
        if config.activation_checkpointing == SELECTIVE:
            plain = functools.partial(create_selective_checkpoint_contexts, _policy)  # as torch.compile wants it
            ways["context_fn"] = plain if config.compile else _contexts
        try:
            enable(ways)
        except ValueError as error:
            raise UserError(f"{asked}: {str(error).splitlines()[0]}; set it to false") from None
        model.disable_input_require_grads()  # only reentrant checkpointing needs it; the embedding has no backward
    if config.recomputed_every > 1:
        for number, layer in enumerate(_checkpointed(model, asked)):
            layer.gradient_checkpointing = number % config.recomputed_every == 0
    if config.offload_activations:
        for layer in _checkpointed(model, "model.offload_activations=true"):
            compute = layer._gradient_checkpointing_func if layer.gradient_checkpointing else _call
            layer._gradient_checkpointing_func = functools.partial(offloaded, compute)
            layer.gradient_checkpointing = True  # by which transformers calls the function above


def _checkpointed(model: PreTrainedModel, asked: str) -> list[Any]:
    """The decoder layers. Raises ``UserError`` if one of them is computed by no function of its own."""
    layers = decoder_layers(model)
    if other := next((layer for layer in layers if not isinstance(layer, GradientCheckpointingLayer)), None):
        raise UserError(
            f"{asked}: {type(other).__name__} of {class_name(model)} is no GradientCheckpointingLayer of transformers; "
            f"set it to false"
        )
    return layers


def _policy(_: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:  # noqa: ARG001
    kept = _KEPT.search(str(operation))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    forward, again = create_selective_checkpoint_contexts(_policy)
    return forward, _explained(again)


@contextlib.contextmanager
def _explained(recomputing: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    try:
        with recomputing:
            yield
    except RuntimeError as error:
        if "has been mutated" not in str(error):
            raise
        raise UserError(
            "model.activation_checkpointing=selective: a layer of this model changes the result of a product in place, which "
            "cannot be kept; set it to true"
        ) from None


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)
