"""A Hugging Face causal language model, built on the meta device, sharded by rows with FSDP2, and loaded from safetensors.

    meta model -> fully_shard(each decoder layer), fully_shard(root) -> empty shards -> this rank's rows of every tensor

Each rank reads only its own rows. A checkpoint is accepted only if each row of the model's tensors is a row of one of its own,
see ``names``; quantised weights are rejected. Loaded rows are checked against the files. With ``model.base_dtype`` the matrices
of the decoder are quantised as they are read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from liftdist.distributed.collectives import together
from liftdist.distributed.mesh import Mesh
from liftdist.distributed.sharding import fsdp_modules
from liftdist.engine import quantised
from liftdist.engine.decoder import towers
from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import recompute
from liftdist.models.build import (
    build,
    check_type,
    class_name,
    decoder_layers,
    kept_in_float32,
    own_embedding,
    tensors,
)
from liftdist.models.fill import fill, verify
from liftdist.models.names import NameMap, match
from liftdist.models.weights import ModelFolder


def load(
    folder: Path,
    config: ModelConfig,
    mesh: Mesh,
    check: Callable[[], None] = lambda: None,
    prepare: Callable[[PreTrainedModel, NameMap], NameMap] = lambda _, names: names,
) -> tuple[PreTrainedModel, NameMap]:
    """The model, its parameters sharded by rows over ``mesh.shard_mesh`` and loaded, and the names of its tensors. Collective.

    Gradients are summed over the shards in float32, not averaged.

    Args:
        check: called after every tensor; may raise.
        prepare: may change the model on the meta device, before it is sharded: freeze parameters, or keep them in float32, in
            which case the model computes with them in ``config.dtype`` all the same. Returns the names after that.

    Raises:
        UserError: the checkpoint does not match the model name by name (the first mismatches are named).
    """
    with together():
        hf_config = check_type(folder, config)
        files = ModelFolder(folder)
        model = build(hf_config, config)
        names = prepare(model, match(model, files))
    shard(model, config, mesh)
    if config.base_dtype is not None:
        matrices = {place.param for place in principal_matrices(model).values()}
        quantised.quantise(fsdp_modules(model), matrices, config.base_dtype, mesh.device)
    model.to_empty(device=mesh.device)
    model.tie_weights()
    with together():
        compute_buffers(model)
        fill(model, files, names, check)
        verify(model, files, names, random.Random(mesh.rank))
    return model, names


def shard(model: PreTrainedModel, config: ModelConfig, mesh: Mesh) -> None:
    """Shard the parameters by rows with FSDP2, one unit per decoder layer. Gradients are summed in float32.

    Units of their own are

    - what several layers share,
    - a module with parameters that the model computes with in another dtype than its own: of a unit, what is trained must have
      one dtype, and all is gathered in one,
    - each tower, which is never gathered if only texts pass,
    - an embedding that shares no weight with the head: it is needed at the start of a forward, the head at the end.

    Scalars, which have no rows, are whole on every rank. On a single shard so is what is frozen, which FSDP would copy to use it;
    but what is kept quantised.
    """
    recompute.keep(model, config)
    dtype = getattr(torch, config.dtype)
    kept = set(kept_in_float32(model, dtype).values())
    masters = {p for p in model.parameters() if p.requires_grad and p.dtype != dtype and p not in kept}
    whole = {param for param in model.parameters() if not param.ndim}
    if mesh.shard_mesh.size() == 1:
        quantised = {place.param for place in principal_matrices(model).values()} if config.base_dtype else set()
        whole |= {param for param in model.parameters() if not param.requires_grad} - quantised

    def unit(*modules: nn.Module) -> None:
        """Shard what is not sharded yet; parameters that are kept in another dtype than they are computed with, are cast."""
        casts = any(param in masters for module in modules for param in module.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if casts else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(list(modules), mesh=mesh.shard_mesh, mp_policy=policy, ignored_params=whole)

    layers = decoder_layers(model)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if any(p in kept and (p.requires_grad or masters) for p in own):
            if any(p in masters for p in own):
                raise UserError(
                    f"{class_name(model)}: {name} has parameters that are computed with in float32 and in {config.dtype}, which "
                    f"cannot both be trained; set model.dtype=float32, or leave it out of selection.modules"
                )
            for child in module.children() if masters else ():
                if not isinstance(child, FSDPModule) and any(True for _ in child.parameters()):
                    unit(child)
            unit(module)
    for modules in shared_modules(layers):
        unit(*modules)
    for layer in layers:
        if config.compile:
            layer.compile()
        if not isinstance(layer, FSDPModule):  # nor one of which everything is shared
            unit(layer)
    for tower in towers(model):
        if not isinstance(tower, FSDPModule):  # nor a layer
            unit(tower)
    if (embedding := own_embedding(model)) is not None:
        unit(embedding)
        # only itself, which prefetches nothing: by default FSDP would gather the embedding again
        layers[0].set_modules_to_backward_prefetch([layers[0]])  # type: ignore[operator]
    for layer in layers[max(0, len(layers) - config.keep_gathered) :] if mesh.shard_mesh.size() > 1 else ():
        layer.set_reshard_after_forward(False)  # type: ignore[operator]
    unit(model)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def shared_modules(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The outermost modules whose parameters several layers share, those with the same parameters together."""
    owners = Counter(id(param) for layer in layers for param in layer.parameters())
    found: dict[tuple[int, ...], list[nn.Module]] = {}

    def collect(module: nn.Module) -> None:
        params = tuple(id(param) for param in module.parameters())
        if params and all(owners[param] > 1 for param in params):
            found.setdefault(params, []).append(module)
        else:
            for child in module.children():
                collect(child)

    for layer in layers:
        collect(layer)
    return [list(dict.fromkeys(modules)) for modules in found.values()]


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that checkpoints do not hold (rotary frequencies, masks, embedding scales), as transformers does.

    A buffer is computed if its values do not depend on those that it had before.

    Raises:
        UserError: transformers computes one of them nowhere.
    """
    stored = tensors(model)
    for tensor in stored.values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # leave it alone
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    owners = {name.rpartition(".")[0] for name in buffers}
    results = []
    for before in (0, 1):
        for buffer in buffers.values():
            buffer.fill_(before)
        _compute_buffers(model, "", model, owners)
        results.append({name: buffer.clone() for name, buffer in buffers.items()})
    for name in buffers:
        if not torch.equal(results[0][name], results[1][name]):
            raise UserError(
                f"{class_name(model)}: not supported: transformers does not initialise the buffer {name}, which "
                "checkpoints do not hold"
            )


def _compute_buffers(module: nn.Module, name: str, enclosing: PreTrainedModel, owners: set[str]) -> None:
    """Initialise the modules named in ``owners`` and those around them, each by the nearest model that it is part of."""
    if isinstance(module, PreTrainedModel):
        enclosing = module
    prefix = f"{name}." if name else ""
    for child_name, child in module.named_children():
        _compute_buffers(child, prefix + child_name, enclosing, owners)
    if name in owners or any(owner.startswith(prefix) for owner in owners):
        enclosing._init_weights(module)
