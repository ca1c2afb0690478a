"""Names of a model's tensors, and their names in its checkpoint."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from liftdist.errors import UserError
from liftdist.models.build import tensors
from liftdist.models.weights import ModelFolder


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
