"""The table of families in the guide, docs/families.md: what is trained of each, and whether it keeps packed samples apart.

python tests/family_table.py        write it, from the tiny models of families.py; takes minutes
"""

import tempfile
from collections import Counter
from pathlib import Path

import families
import torch
from transformers import AutoConfig

from liftdist.engine.matrices import principal_matrices
from liftdist.errors import UserError
from liftdist.model_settings import ModelConfig
from liftdist.models import build
from liftdist.models.head import in_chunks, is_plain
from liftdist.models.names import match
from liftdist.models.weights import ModelFolder
from liftdist.training import packing

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
HEAD = """---
description: Every model family that the tests try; what is trained of it, and whether samples can be packed.
---

# Families

Made from tiny random models of every family, saved as they are published, by transformers {version}. Of each the tests compare
with plain transformers: every parameter and buffer, the loss of padded samples (to 1e-5, in float32), the gradients of the
trained weights, the logits in bf16 (to the bit), and the export, which transformers loads again and in which all that was not
trained is the same byte for byte.

*Packed*: how samples of one sequence are kept apart with `data.packing`, which a run tries out before its first step. Kernels
that are not installed here may keep apart what is refused here.

| `model_type` | class | trained | packed |
|---|---|---|---|
"""
WAYS = {"masks": "by a mask", "masks_and_bounds": "by kernels"}


def rows() -> dict[str, str]:
    """The row of each family."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: row(name, Path(folder) / name) for name in families.FAMILIES if name not in families.NOT_HERE}


def row(name: str, folder: Path) -> str:
    families.make(folder, name)
    config = ModelConfig(path=str(folder), dtype="float32")
    meta = build.build(build.check_type(folder, config), config)
    match(meta, ModelFolder(folder))
    kinds = Counter(
        ("" if place.is_whole else "experts' ") + key.removesuffix(".weight").rpartition(".")[2]
        for key, place in principal_matrices(meta).items()
    )
    model = families.plain(folder).requires_grad_(False)
    cpu = torch.device("cpu")
    if is_plain(model, cpu):
        in_chunks(model)
    try:
        packing.keep_apart(model, cpu, 60, 2)
        way = model.separating.func.__name__ if hasattr(model, "separating") else ""
        packed = WAYS.get(way, "by positions")
    except UserError:
        packed = "refused"
    model_type = AutoConfig.from_pretrained(folder).model_type
    return f"| `{model_type}` | `{type(meta).__name__}` | {', '.join(f'`{kind}`' for kind in kinds)} | {packed} |"


def page() -> str:
    import transformers

    made = sorted(set(rows().values()))
    refused = sorted(f"- `{name}`: {why}" for name, why in families.NOT_HERE.items())
    return (
        HEAD.format(version=transformers.__version__)
        + "\n".join(made)
        + "\n\nNot compared:\n\n"
        + "\n".join(refused)
        + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
