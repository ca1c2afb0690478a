"""The adapters that a checkpoint of a LoRA run holds: read as peft's files hold them, and merged into base weights.

PiSSA's are read as LoRA of twice the rank, as peft converts them: on the unchanged base weight ``W``,

    W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]        s = alpha / r = 2 alpha / 2 r

EVA's are LoRA whose rank differs from module to module: rows of A that are zero have been allotted to others, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from liftdist.errors import UserError
from liftdist.method_settings import LoraConfig
from liftdist.model_settings import ModelConfig
from liftdist.runs.checkpoint import Step

if TYPE_CHECKING:  # transformers takes seconds to import, and most deltas need none of it
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint."""

    step: Step
    trained: LoraConfig  # settings of the run
    model: ModelConfig  # that the run started from

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, on the meta device."""
        from liftdist.models.build import build, check_type

        return build(check_type(Path(self.model.path), self.model), self.model)

    @cached_property
    def settings(self) -> LoraConfig:
        """Settings of what is read; the values are all that there is of how it was initialised."""
        twice = 2 if self.trained.variant == "pissa" else 1
        variant = "lora" if self.trained.variant == "pissa" else self.trained.variant
        rank, alpha = twice * self.trained.rank, twice * self.trained.alpha
        return replace(self.trained, rank=rank, alpha=alpha, variant=variant, pissa_niter=None)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """With EVA the rank of each module, which may be 0; empty otherwise."""
        if self.trained.variant != "eva":
            return {}
        return {module: int(self.read(module)["lora_A.weight"].any(dim=1).sum()) for module in self.modules}

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules in the model."""
        return [name.removesuffix(".weight") for name in self.step.manifest.snapshot.names]

    def read(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module's adapter in float32, by their name in the module: ``lora_A.weight`` ``[r, n]``,
        ``lora_B.weight`` ``[m, r]``, and ``lora_magnitude_vector`` ``[m]`` of DoRA; ``miss_block``; or ``shira_weight`` ``[k]``
        and ``shira_indices`` ``[2, k]`` int32."""
        try:
            return self._read(module)
        except FileNotFoundError:
            raise removed(self.step) from None

    def _read(self, module: str) -> dict[str, Tensor]:
        names = [name for name in self.step.manifest.parameters if name.startswith(f"{module}.")]
        found = {name.removeprefix(f"{module}."): self._whole(name, "values") for name in names}
        if self.trained.variant == "pissa":
            a, b = (self._whole(f"{module}.{key}.weight", "initial") for key in ("lora_A", "lora_B"))
            found["lora_A.weight"] = torch.cat([found["lora_A.weight"], a])
            found["lora_B.weight"] = torch.cat([found["lora_B.weight"], -b], dim=1)
        if self.trained.variant == "shira":
            flat, columns = self.step.whole(f"{module}.shira_weight", "places"), self.shape(module)[1]
            found["shira_indices"] = torch.stack([flat // columns, flat % columns])
        return found

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """``[m, n]`` float32: a module's matrix of the base model with its adapter."""
        from liftdist.models import adapters

        return adapters.merged(self.settings, weight, self.read(module))

    def shape(self, module: str) -> tuple[int, int]:
        """``m``, ``n`` of a module's matrix."""
        layer = self.base.get_submodule(module)
        rows, columns = layer.weight.shape
        return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)

    def _whole(self, name: str, key: str) -> Tensor:
        rows, columns = self.step.manifest.parameters[name].shape
        values = self.step.whole(name, key).float()
        if name.endswith(("lora_magnitude_vector", "shira_weight")):
            return values
        return values.view(-1, columns, columns) if self.trained.miss_init == "bat" else values.view(rows, columns)


def removed(step: Step) -> UserError:
    """Says that the files of a checkpoint are not there any more."""
    return UserError(f"{step.folder}: was removed during the export; a file named keep in a checkpoint prevents that")


def of_step(step: Step, base_folder: Path) -> Adapters | None:
    """The adapters of a checkpoint of a run from ``base_folder``; None if the run has another method."""
    config = OmegaConf.create(step.manifest.provenance.config)
    if OmegaConf.select(config, "method") != "lora":
        return None
    given = OmegaConf.select(config, "lora", default={})
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoraConfig), given))
    assert isinstance(settings, LoraConfig)
    return Adapters(step, settings, ModelConfig(path=str(base_folder), trust_remote_code=trusts(step)))


def trusts(step: Step) -> bool:
    """Whether the run was to run code that comes with its base model."""
    return bool(OmegaConf.select(OmegaConf.create(step.manifest.provenance.config), "model.trust_remote_code"))
