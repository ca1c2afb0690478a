"""A Hugging Face causal language model, built on the meta device, sharded by rows with FSDP2, and loaded from safetensors.

    meta model -> fully_shard(each decoder layer), fully_shard(root) -> empty shards -> this rank's rows of every tensor

Each rank reads only its own rows. A checkpoint is accepted only if each row of the model's tensors is a row of one of its own,
see ``names``; quantised weights are rejected. Loaded rows are checked against the files.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from liftdist.distributed.collectives import together
from liftdist.distributed.mesh import Mesh
from liftdist.distributed.sharding import rows_local
from liftdist.errors import UserError
from liftdist.models.build import build, check_type, decoder_layers, own_embedding, recompute, tensors
from liftdist.models.names import NameMap, match
from liftdist.models.weights import ModelFolder
from liftdist.schema import ModelConfig


def load(
    folder: Path, config: ModelConfig, mesh: Mesh, check: Callable[[], None] = lambda: None
) -> tuple[PreTrainedModel, NameMap]:
    """The model, its parameters sharded by rows over ``mesh.shard_mesh`` and loaded, and the names of its tensors. Collective.

    Freezing parameters is left to the caller. Gradients are summed over the shards in float32, not averaged.

    Args:
        check: called after every tensor; may raise.

    Raises:
        UserError: the checkpoint does not match the model name by name (the first mismatches are named).
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
    return model, names


def shard(model: PreTrainedModel, config: ModelConfig, mesh: Mesh) -> None:
    """Shard the parameters by rows with FSDP2, one unit per decoder layer. Gradients are summed in float32.

    An embedding that shares no weight with the head is a unit of its own: it is needed at the start of a forward, the head at the
    end.
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
        # only itself, which prefetches nothing: by default FSDP would gather the embedding again
        first.set_modules_to_backward_prefetch([first])  # type: ignore[operator]
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that checkpoints do not hold (rotary frequencies, embedding scales), as transformers does."""
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
                raise UserError(
                    f"{type(model).__name__}: not supported: transformers does not initialise the buffer {key}, "
                    "which checkpoints do not hold"
                )


@torch.no_grad()
def _fill(model: PreTrainedModel, files: ModelFolder, names: NameMap, check: Callable[[], None]) -> None:
    for name, tensor in tensors(model).items():
        first, rows = rows_local(tensor)
        for piece in names.pieces[name]:
            begin, end = max(piece.row - first, 0), min(piece.row + piece.rows - first, len(rows))
            if begin < end:
                stored = first + begin - piece.row + piece.source_row
                rows[begin:end].copy_(files.rows(piece.source, stored, stored + end - begin))
                check()


@torch.no_grad()
def _verify(model: PreTrainedModel, files: ModelFolder, names: NameMap, rng: random.Random) -> None:
    """Compare a random row of every tensor in the model with that of its file. Catches misplaced rows."""
    for name, tensor in tensors(model).items():
        first, rows = rows_local(tensor)
        if not rows.numel():
            continue
        row = rng.randrange(len(rows))
        piece = next(p for p in names.pieces[name] if p.row <= first + row < p.row + p.rows)
        expected = files.row(piece.source, first + row - piece.row + piece.source_row).to(rows.dtype)
        if not torch.equal(rows[row].cpu().flatten(), expected):
            raise RuntimeError(f"{name}: row {first + row} is not what {files.file_of[piece.source]} holds")
