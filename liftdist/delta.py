"""What a run leaves behind to use: the fine-tuned model as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from liftdist import model as models
from liftdist import preflight
from liftdist.mesh import Mesh, together

SHARD_SIZE = "2GB"  # also bounds what the writing rank holds in memory
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")


def export_merged(model: PreTrainedModel, base: Path, target: Path, mesh: Mesh) -> None:
    """Write ``model`` to the folder ``target``, which must not exist, under the names of the checkpoint ``base``. Collective.

    Tensors are gathered one at a time; config, tokenizer, generation config and chat template are those of ``base``.
    """
    with together():
        checkpoint = models.Checkpoint(base)
        names = models.match(model, checkpoint)
        own = {names[name]: tensor for name, tensor in models.tensors(model).items()}
        plan = split_torch_state_dict_into_shards(
            {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in own.items()},
            max_shard_size=SHARD_SIZE,
        )
        if mesh.is_main:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    for file, members in plan.filename_to_tensors.items():
        shard = {}
        for name in members:
            whole = own[name].detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if mesh.is_main:
                shard[name] = whole.cpu().contiguous()
            del whole
        with together():
            if mesh.is_main:
                save_file(shard, temporary / file, metadata={"format": "pt"})
    with together():
        if mesh.is_main:
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                (temporary / preflight.INDEX).write_text(json.dumps(index, indent=2))
            _copy_companions(base, temporary, str(model.dtype).removeprefix("torch."))
            for file in temporary.iterdir():
                file.chmod(0o644)
            temporary.chmod(0o755)
            temporary.rename(target)


def _copy_companions(base: Path, target: Path, dtype: str) -> None:
    for file in base.iterdir():
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name != preflight.INDEX:
            shutil.copy(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # the older name of the same
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
