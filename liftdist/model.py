"""A Hugging Face causal language model, built without memory, cut by rows with FSDP2, and filled from safetensors.

    meta model -> fully_shard(each decoder layer), fully_shard(root) -> empty shards -> this rank's rows of every tensor

Each rank reads only its own rows. A checkpoint is taken only if its tensors are the model's parameters name by name: what
transformers would have to convert (fused experts, quantised weights) is refused. What was read is checked against the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from liftdist import preflight
from liftdist.config import ModelConfig, UserError
from liftdist.mesh import Mesh, gather, local_tensor, row_bounds, together


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


class Checkpoint:
    """The safetensors files of a folder, opened one at a time, read by name and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        preflight.check_weight_files(folder)
        try:
            if (folder / preflight.INDEX).exists():
                index = json.loads((folder / preflight.INDEX).read_text())["weight_map"]
                files = sorted(set(index.values()))
            else:
                files = [preflight.WEIGHTS]
            self._headers = {file: _header(folder / file) for file in files}
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"model.path {folder}: damaged weights: {error}") from None
        self.file_of = {
            name: file for file, header in self._headers.items() for name in header if name != "__metadata__"
        }
        if (folder / preflight.INDEX).exists() and (missing := sorted(set(index) - set(self.file_of))):
            raise UserError(f"model.path {folder}: {missing[0]} is not in the file that {preflight.INDEX} names")

    def info(self, name: str) -> dict[str, Any]:
        """``dtype`` and ``shape`` of a tensor as its file states them, with the byte range ``data_offsets``."""
        return self._headers[self.file_of[name]][name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows ``begin`` to ``end`` of a tensor, in the dtype of the file."""
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            return file.get_tensor(name) if end is None else file.get_slice(name)[begin:end]

    def data(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in pieces."""
        path = self.folder / self.file_of[name]
        with path.open("rb") as file:
            base = 8 + struct.unpack("<Q", file.read(8))[0]
            begin, end = self.info(name)["data_offsets"]
            file.seek(base + begin)
            for offset in range(begin, end, 1 << 22):
                yield file.read(min(1 << 22, end - offset))


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            raise ValueError(f"{path.name} is not a complete safetensors file")
        header = json.loads(file.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes, its header speaks of {8 + length + end}")
    return header


def load(folder: Path, config: ModelConfig, mesh: Mesh) -> PreTrainedModel:
    """The model, its parameters cut by rows over ``mesh.shard_mesh`` and filled. Collective.

    Frozen or not is left to the caller. Gradients are summed over the shards in float32, not averaged.

    Raises:
        UserError: the checkpoint does not fit the model name by name (the first offenders are named).
    """
    with together():
        hf_config = check_type(folder, config)
        checkpoint = Checkpoint(folder)
        model = build(hf_config, config)
        names = match(model, checkpoint)
    _shard(model, config, mesh)
    model.to_empty(device=mesh.device)
    model.tie_weights()
    with together():
        _compute_buffers(model)
        _fill(model, checkpoint, names)
        _verify(model, checkpoint, names, random.Random(mesh.rank))
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


def match(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """For each tensor of the model the name it has in the checkpoint, which is its own; the base model's prefix may be absent.

    Raises:
        UserError: a tensor is absent, of another shape, or left over.
    """
    own = tensors(model)
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(transform, WeightConverter):
            for name in checkpoint.file_of:
                if transform.rename_source_key(name)[1] is not None:
                    steps = ", ".join(type(operation).__name__ for operation in transform.operations)
                    raise UserError(
                        f"model.path {checkpoint.folder}: {name} would have to be converted ({steps}): not supported"
                    )
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(
        own
    )  # tied: shared with another
    prefix = f"{model.base_model_prefix}."
    names, problems = {}, []
    for name, tensor in own.items():
        stored = name if name in checkpoint.file_of else name.removeprefix(prefix)
        if stored not in checkpoint.file_of:
            problems.append(f"{name} is not in the checkpoint")
        elif tuple(checkpoint.info(stored)["shape"]) != tuple(tensor.shape):
            problems.append(
                f"{name} is {checkpoint.info(stored)['shape']} in the checkpoint, {list(tensor.shape)} in the model"
            )
        elif checkpoint.info(stored)["dtype"] not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {checkpoint.info(stored)['dtype']}: quantised weights are not supported")
        else:
            names[name] = stored
    known = set(names.values()) | aliases | {alias.removeprefix(prefix) for alias in aliases}
    left_over = [n for n in checkpoint.file_of if n not in known and not n.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} of the checkpoint is not in the model" for name in left_over]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"model.path {checkpoint.folder}: weights that would have to be converted are not supported: "
            + "; ".join(problems[:3])
            + more
        )
    return names


def _shard(model: PreTrainedModel, config: ModelConfig, mesh: Mesh) -> None:
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"mesh": mesh.shard_mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for layer in decoder_layers(model):
        if config.compile:
            layer.compile()
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _compute_buffers(model: PreTrainedModel) -> None:
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


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The rows ``[begin, end)`` of a parameter that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.ndim else 0
    axis = tensor.placements.index(Shard(0))
    bounds = row_bounds(tensor.shape[0], tensor.device_mesh.size(axis))
    shard = tensor.device_mesh.get_local_rank(axis)
    return bounds[shard], bounds[shard + 1]


@torch.no_grad()
def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    for name, tensor in tensors(model).items():
        begin, end = rows_of(tensor)
        local = local_tensor(tensor)
        if local.numel():
            local.copy_(checkpoint.read(names[name], begin, end) if tensor.ndim else checkpoint.read(names[name]))


@torch.no_grad()
def _verify(model: PreTrainedModel, checkpoint: Checkpoint, names: dict[str, str], chance: random.Random) -> None:
    """Compare a random row of every tensor, as the model holds it, with the file read whole. Catches rows in wrong places."""
    for name, tensor in tensors(model).items():
        begin, end = rows_of(tensor)
        if end <= begin:
            continue
        row = chance.randrange(begin, end)
        local = local_tensor(tensor)
        info = checkpoint.info(names[name])
        if local.shape[1:] != torch.Size(info["shape"][1:]) or local.shape[0] != end - begin:
            raise RuntimeError(f"{name}: holds {tuple(local.shape)}, not rows {begin} to {end} of {info['shape']}")
        expected = _stored_row(checkpoint, names[name], row).to(local.dtype)
        if not torch.equal(local[row - begin].cpu(), expected):
            raise RuntimeError(f"{name}: row {row} is not what {checkpoint.file_of[names[name]]} holds")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stored_row(checkpoint: Checkpoint, name: str, row: int) -> Tensor:
    """One row, from the bytes of the file rather than by the reader that filled the model."""
    info = checkpoint.info(name)
    dtype, row_shape = _DTYPES[info["dtype"]], info["shape"][1:]
    size = dtype.itemsize * int(torch.Size(row_shape).numel())
    with (checkpoint.folder / checkpoint.file_of[name]).open("rb") as file:
        base = 8 + struct.unpack("<Q", file.read(8))[0]
        file.seek(base + info["data_offsets"][0] + row * size)
        return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(row_shape)


def digest(folder: Path, cache_dir: Path) -> str:
    """sha256 over name, dtype, shape and sha256 of every tensor of the checkpoint: the same weights, the same digest.

    Every rank hashes its share of the tensors; remembered in ``cache_dir`` by path, size and time. Collective.
    """
    import torch.distributed as dist

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with together():
        checkpoint = Checkpoint(folder)
        files = [folder / file for file in sorted(set(checkpoint.file_of.values()))]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()[:24]
        remembered = cache_dir.expanduser() / "digests" / key
        known = remembered.read_text() if remembered.exists() else ""
    if all(gather(len(known) == 64)):
        return known

    def hash_tensor(name: str) -> tuple[str, str]:
        state = hashlib.sha256()
        for piece in checkpoint.data(name):
            state.update(piece)
        return name, state.hexdigest()

    with together():
        mine = sorted(checkpoint.file_of)[rank::ranks]
        with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
            hashes = dict(pool.map(hash_tensor, mine))
    merged = {name: value for share in gather(hashes) for name, value in share.items()}
    lines = [
        f"{name} {checkpoint.info(name)['dtype']} {checkpoint.info(name)['shape']} {merged[name]}"
        for name in sorted(merged)
    ]
    result = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with contextlib.suppress(OSError):  # only a shortcut
        remembered.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=remembered.parent, delete=False) as file:
            file.write(result)
        Path(file.name).chmod(0o644)
        Path(file.name).rename(remembered)
    return result
