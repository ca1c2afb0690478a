"""The names of a model's tensors in the model and in its checkpoint."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from liftdist.errors import UserError
from liftdist.models.build import build, check_type, tensors
from liftdist.models.weights import ModelFolder
from liftdist.schema import ModelConfig


@dataclass(frozen=True)
class NameMap:
    """The names of a model's tensors and of those in its checkpoint, one to one.

    Made when a model is loaded, and kept with the run.
    """

    stored: Mapping[str, str]  # by the name in the model

    @cached_property
    def parameter(self) -> dict[str, str]:
        """The inverse map: the name in the model, by the name in the checkpoint."""
        return {stored: name for name, stored in self.stored.items()}

    @classmethod
    def between(cls, own: Iterable[str], stored: Container[str], prefix: str) -> NameMap:
        """Map each of ``own`` to its name in ``stored``: itself, or itself without ``prefix``. Those not stored are left out."""
        pairs = {}
        for name in own:
            short = name.removeprefix(f"{prefix}.")
            if name in stored or short in stored:
                pairs[name] = name if name in stored else short
        return cls(pairs)


def of_folder(folder: Path, trust_remote_code: bool = False) -> NameMap:
    """The map of a model folder. Reads no weights. Raises ``UserError`` like :func:`match`."""
    config = ModelConfig(path=str(folder), trust_remote_code=trust_remote_code)
    return match(build(check_type(folder, config), config), ModelFolder(folder))


def match(model: PreTrainedModel, files: ModelFolder) -> NameMap:
    """The map between a model, which may be on the meta device, and its files.

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
    # names of tied parameters, which a checkpoint may hold as well
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    names = NameMap.between(own, files.file_of, model.base_model_prefix)
    problems = []
    for name, tensor in own.items():
        stored = names.stored.get(name, "")
        if not stored:
            problems.append(f"{name} is not in the checkpoint")
        elif tuple(files.info(stored)["shape"]) != tuple(tensor.shape):
            problems.append(
                f"{name} is {files.info(stored)['shape']} in the checkpoint, {list(tensor.shape)} in the model"
            )
        elif files.info(stored)["dtype"] not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {files.info(stored)['dtype']}: quantised weights are not supported")
    tied = NameMap.between(aliases, files.file_of, model.base_model_prefix)
    known = {*names.parameter, *tied.parameter}
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
