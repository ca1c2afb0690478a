"""A Hugging Face causal language model, built without memory, cut by rows with FSDP2, and filled from safetensors.

    meta model -> fully_shard(each decoder layer), fully_shard(root) -> empty shards -> this rank's rows of every tensor

Each rank reads only its own rows. A checkpoint is taken only if its tensors are the model's parameters name by name: what
transformers would have to convert (fused experts, quantised weights) is refused. What was read is checked against the file.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from liftdist import preflight
from liftdist.distributed.mesh import Mesh, local_tensor, rows_of, together
from liftdist.models.weights import ModelFolder
from liftdist.schema import ModelConfig, UserError


def check_type(folder: Path, config: ModelConfig) -> Any:
    """The transformers configuration in ``folder``; reads no weights.

    Raises:
        UserError: no or damaged ``config.json``, unknown or unsupported model type, quantised weights, no safetensors.
    """
    preflight.check_model_folder(folder, config.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a malformed field surfaces as almost anything
        raise UserError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from None


def load_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``. Raises ``UserError`` if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the library raises almost anything
        raise UserError(f"model.path {folder}: no usable tokenizer: {str(error).splitlines()[0]}") from None


def load(folder: Path, config: ModelConfig, mesh: Mesh, check: Callable[[], None] = lambda: None) -> PreTrainedModel:
    """The model, its parameters cut by rows over ``mesh.shard_mesh`` and filled. Collective.

    ``check`` is called after every tensor. Frozen or not is left to the caller.
    Gradients are summed over the shards in float32, not averaged.

    Raises:
        UserError: the checkpoint does not fit the model name by name (the first offenders are named).
    """
    with together():
        hf_config = check_type(folder, config)
        files = ModelFolder(folder)
        model = build(hf_config, config)
        names = match(model, files)
    shard(model, config, mesh)
    model.to_empty(device=mesh.device)
    model.tie_weights()
    with together():
        compute_buffers(model)
        _fill(model, files, names, check)
        _verify(model, files, names, random.Random(mesh.rank))
    return model


def build(hf_config: Any, config: ModelConfig) -> PreTrainedModel:
    """The model without memory (on the meta device). Raises ``UserError`` for an architecture that is not supported."""
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
    for name, param in model.named_parameters():
        if param.ndim > 2:
            raise UserError(f"{type(model).__name__}: {name} {tuple(param.shape)}: fused experts are not supported")
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises ``UserError`` for a model that is built otherwise."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"{type(model).__name__}: its decoder has no list of layers, which is not supported")
    return layers


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once."""
    persistent = set(model.state_dict(keep_vars=True))
    return {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name in persistent or isinstance(tensor, nn.Parameter)
    }


def match(model: PreTrainedModel, files: ModelFolder) -> dict[str, str]:
    """For each tensor of the model the name it has in the files, which is its own; the base model's prefix may be absent.

    Raises:
        UserError: a tensor is absent, of another shape, or left over.
    """
    own = tensors(model)
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(transform, WeightConverter):
            for name in files.file_of:
                if transform.rename_source_key(name)[1] is not None:
                    steps = ", ".join(type(operation).__name__ for operation in transform.operations)
                    raise UserError(
                        f"model.path {files.folder}: {name} would have to be converted ({steps}): not supported"
                    )
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(
        own
    )  # tied: shared with another
    prefix = f"{model.base_model_prefix}."
    names, problems = {}, []
    for name, tensor in own.items():
        stored = name if name in files.file_of else name.removeprefix(prefix)
        if stored not in files.file_of:
            problems.append(f"{name} is not in the checkpoint")
        elif tuple(files.info(stored)["shape"]) != tuple(tensor.shape):
            problems.append(
                f"{name} is {files.info(stored)['shape']} in the checkpoint, {list(tensor.shape)} in the model"
            )
        elif files.info(stored)["dtype"] not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {files.info(stored)['dtype']}: quantised weights are not supported")
        else:
            names[name] = stored
    known = set(names.values()) | aliases | {alias.removeprefix(prefix) for alias in aliases}
    left_over = [n for n in files.file_of if n not in known and not n.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} of the checkpoint is not in the model" for name in left_over]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"model.path {files.folder}: weights that would have to be converted are not supported: "
            + "; ".join(problems[:3])
            + more
        )
    return names


def shard(model: PreTrainedModel, config: ModelConfig, mesh: Mesh) -> None:
    """Cut the parameters by rows with FSDP2, each decoder layer a unit. Gradients are summed in float32.

    So is an embedding that is not the head, too: it is needed at the beginning alone, the rest at the end.
    """
    recompute(model, config)
    options: dict[str, Any] = {"mesh": mesh.shard_mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for layer in decoder_layers(model):
        if config.compile:
            layer.compile()
        fully_shard(layer, **options)
    if (embedding := own_embedding(model)) is not None:
        fully_shard(embedding, **options)
        first = decoder_layers(model)[0]
        # itself, so nothing: FSDP would gather the embedding again
        first.set_modules_to_backward_prefetch([first])  # type: ignore[operator]
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def own_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The embedding of tokens, where the output head is a module with a weight of its own."""
    head = model.get_output_embeddings()
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # under a name that transformers does not know
        return None
    if head is None or {id(param) for param in head.parameters()} & {id(param) for param in embedding.parameters()}:
        return None
    return embedding


def recompute(model: PreTrainedModel, config: ModelConfig) -> None:
    """Have each decoder layer recomputed in backward, where the config says so."""
    if config.activation_checkpointing:  # the older name is that of transformers 5.17
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # for the reentrant kind; the embedding has no backward


def compute_buffers(model: PreTrainedModel) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies, embedding scales), as transformers does."""
    stored = set(tensors(model))
    for name, module in model.named_modules():
        computed = {
            key: buffer
            for key, buffer in module.named_buffers(name, recurse=False)
            if key not in stored and buffer.is_floating_point()
        }
        if not computed:
            continue
        for buffer in computed.values():
            buffer.fill_(torch.nan)
        for param in module.parameters(recurse=False):
            param._is_hf_initialized = True
        model._init_weights(module)
        for key, buffer in computed.items():
            if buffer.isnan().any():
                raise UserError(f"{type(model).__name__}: transformers does not say how to compute the buffer {key}")


@torch.no_grad()
def _fill(model: PreTrainedModel, files: ModelFolder, names: dict[str, str], check: Callable[[], None]) -> None:
    for name, tensor in tensors(model).items():
        begin, end = rows_of(tensor)
        local = local_tensor(tensor)
        if local.numel():
            local.copy_(files.read(names[name], begin, end) if tensor.ndim else files.read(names[name]))
        check()


@torch.no_grad()
def _verify(model: PreTrainedModel, files: ModelFolder, names: dict[str, str], chance: random.Random) -> None:
    """Compare a random row of every tensor, as the model holds it, with the file read whole. Catches rows in wrong places."""
    for name, tensor in tensors(model).items():
        begin, end = rows_of(tensor)
        if end <= begin:
            continue
        row = chance.randrange(begin, end)
        local = local_tensor(tensor)
        info = files.info(names[name])
        if local.shape[1:] != torch.Size(info["shape"][1:]) or local.shape[0] != end - begin:
            raise RuntimeError(f"{name}: holds {tuple(local.shape)}, not rows {begin} to {end} of {info['shape']}")
        expected = files.row(names[name], row).to(local.dtype)
        if not torch.equal(local[row - begin].cpu(), expected):
            raise RuntimeError(f"{name}: row {row} is not what {files.file_of[names[name]]} holds")
