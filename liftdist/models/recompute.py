"""What a decoder layer keeps from its forward to its backward: all, its input alone, or either on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from liftdist.errors import UserError
from liftdist.models.build import class_name, decoder_layers
from liftdist.models.offload import offloaded
from liftdist.schema import ModelConfig


def keep(model: PreTrainedModel, config: ModelConfig) -> None:
    """Let the decoder layers of a model keep what the config says. To be called before FSDP shards it.

    Raises:
        UserError: the model's layers cannot.
    """
    if config.activation_checkpointing:  # transformers 5.17 has the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"model.activation_checkpointing=true: {str(error).splitlines()[0]}; set it to false"
            ) from None
        model.disable_input_require_grads()  # only reentrant checkpointing needs it; the embedding has no backward
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


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)
