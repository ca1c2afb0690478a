"""A model on the meta device, and access to its parts."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from liftdist.engine.decoder import layer_lists, towers
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import check


def check_type(folder: Path, config: ModelConfig) -> Any:
    """The transformers configuration in ``folder``, as if its weights were not quantised; reads no weights.

    Raises:
        UserError: no or damaged ``config.json``, unknown or unsupported model type, no safetensors, weights that are quantised in
            a form that is not read.
    """
    check.check_model_folder(folder, config.trust_remote_code)
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a malformed field can raise any error
        raise UserError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None
    for part in {id(part): part for part in (found, found.get_text_config(decoder=True))}.values():
        part.__dict__.pop("quantization_config", None)
    return found


def stop_ids(folder: Path) -> list[int]:
    """Ids of the tokens by which generation stops, by ``generation_config.json`` and ``config.json``."""
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        ids = check.read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= dict.fromkeys(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
    return list(found)


def build(hf_config: Any, config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device, without memory: the class that its checkpoint was saved from, with all that it holds.

    Raises:
        UserError: an architecture that is not supported, or a library that it needs is absent.
    """
    dtype = getattr(torch, config.dtype)
    refuse_settings(hf_config)
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = auto_class(hf_config, config.trust_remote_code).from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        said, *more = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if said.endswith(":") and more:  # the remedy is on the next line
            said = f"{said} {more[0].partition('. ')[0]}"
        setting = (
            f"model.attn_implementation={config.attn_implementation}" if config.attn_implementation else "model.path"
        )
        raise UserError(f"{setting}: the model cannot be built: {said}") from None
    model.tie_weights()
    model.config.use_cache = False
    own = {f"^{name}$" for name, param in model.named_parameters() if param.dtype.itemsize > dtype.itemsize}
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *own}  # what the class makes so
    for tensor in kept_in_float32(model, dtype).values():  # as on loading
        tensor.data = tensor.data.float()
    decoder_layers(model)
    taken = inspect.signature(model.forward).parameters.items()
    if needed := [
        key
        for key, value in taken
        if value.default is value.empty and key != "input_ids" and value.kind == value.POSITIONAL_OR_KEYWORD
    ]:
        raise UserError(
            f"{class_name(model)}: takes no text without {', '.join(needed)}, so it cannot be trained on texts"
        )
    return model


def auto_class(hf_config: Any, trust_remote_code: bool = False) -> Any:
    """The auto class of transformers that loads a checkpoint with everything that it holds.

    Of a multimodal model that is the whole, unless the folder says that it was saved as the language model alone.
    """
    kind, own = hf_config.model_type, getattr(hf_config, "auto_map", None) or {}
    text_class = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if kind not in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or (
        trust_remote_code and "AutoModelForCausalLM" in own
    ):
        return modeling_auto.AutoModelForCausalLM
    if text_class is not None and text_class in (hf_config.architectures or ()):
        return modeling_auto.AutoModelForCausalLM
    return modeling_auto.AutoModelForMultimodalLM


def refuse_settings(hf_config: Any) -> None:
    """Raises ``UserError`` for a configuration whose model cannot be trained on text by several ranks alike."""
    text = hf_config.get_text_config(decoder=True)
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UserError(
            f"model type {hf_config.model_type}: has an encoder and a decoder; only decoders can be trained"
        )
    for key in ("layerdrop", "decoder_layerdrop"):
        if value := getattr(text, key, 0):
            raise UserError(
                f"config.json: {key}={value}: each rank would leave out other layers, and gather weights that the others do "
                f"not; set {key} to 0"
            )


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype take a detour on a device, by which a CPU without such instructions is far slower."""
    has_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16()


def dropout(hf_config: Any) -> dict[str, float]:
    """The rates of dropout that the configuration asks for, by their keys; those that are zero are left out."""
    settings = hf_config.get_text_config(decoder=True).to_dict()
    unused = ("classifier_dropout", "summary_first_dropout")  # of other heads
    named = {key: rate for key, rate in settings.items() if "drop" in key and key not in unused}
    return {key: rate for key, rate in named.items() if isinstance(rate, float) and rate > 0}


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors for which transformers requires float32 in a model of a lower precision, by name."""
    patterns = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    expressions = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return {name: t for name, t in tensors(model).items() if any(e.search(name) for e in expressions)}


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model computes in; trained parameters may be kept in a higher one."""
    return getattr(model.config, "dtype", None) or model.dtype


def class_name(model: PreTrainedModel) -> str:
    """The name of the model's class, also after FSDP2 has derived one from it."""
    return type(model).__name__.removeprefix("FSDP")


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder. Raises ``UserError`` if it has no list of layers."""
    apart = set(towers(model))
    layers = list(dict.fromkeys(layer for found in layer_lists(model) for layer in found if layer not in apart))
    if not layers:
        raise UserError(
            f"{class_name(model)}: has no decoder with a list of layers, which is what can be trained on texts"
        )
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
