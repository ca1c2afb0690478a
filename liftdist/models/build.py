"""A model on the meta device, and access to its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from liftdist.errors import UserError
from liftdist.models import check
from liftdist.schema import ModelConfig


def check_type(folder: Path, config: ModelConfig) -> Any:
    """The transformers configuration in ``folder``; reads no weights.

    Raises:
        UserError: no or damaged ``config.json``, unknown or unsupported model type, quantised weights, no safetensors.
    """
    check.check_model_folder(folder, config.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a malformed field can raise any error
        raise UserError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None


def stop_ids(folder: Path) -> list[int]:
    """Ids of the tokens by which generation stops, by ``generation_config.json`` and ``config.json``."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        ids = check.read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= dict.fromkeys(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
    return list(found)


def build(hf_config: Any, config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, without memory. Raises ``UserError`` for an architecture that is not supported."""
    dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"model.attn_implementation={config.attn_implementation}: {str(error).splitlines()[0]}"
        ) from None
    model.tie_weights()
    model.config.use_cache = False
    decoder_layers(model)
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder. Raises ``UserError`` if the model has no such list."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"{type(model).__name__}: its decoder has no list of layers, which is not supported")
    return layers


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a shared one appears once."""
    persistent = set(model.state_dict(keep_vars=True))
    return {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name in persistent or isinstance(tensor, nn.Parameter)
    }


def own_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The token embedding if it shares no weight with the output head, otherwise None."""
    head = model.get_output_embeddings()
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # under a name that transformers does not know
        return None
    if head is None or {id(param) for param in head.parameters()} & {id(param) for param in embedding.parameters()}:
        return None
    return embedding


def recompute(model: PreTrainedModel, config: ModelConfig) -> None:
    """Enable activation checkpointing of each decoder layer, if the config requests it."""
    if config.activation_checkpointing:  # transformers 5.17 has the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # only reentrant checkpointing needs it; the embedding has no backward
