"""The adapters that a checkpoint of a LoRA run holds: read as peft's files hold them, and merged into base weights.

PiSSA's are read as LoRA of twice the rank, as peft converts them: on the unchanged base weight ``W``,

    W - s B_0 A_0 + s B A  =  W + s [B, -B_0] [A; A_0]        s = alpha / r = 2 alpha / 2 r
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from omegaconf import OmegaConf
from torch import Tensor

from liftdist.errors import UserError
from liftdist.method_settings import LoraConfig
from liftdist.models import adapters
from liftdist.runs.checkpoint import Step


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint."""

    step: Step
    trained: LoraConfig  # settings of the run
    trust_remote_code: bool  # its setting

    @cached_property
    def settings(self) -> LoraConfig:
        """Settings of what is read; the values are all that there is of how it was initialised."""
        twice = 2 if self.trained.variant == "pissa" else 1
        variant = "lora" if self.trained.variant == "pissa" else self.trained.variant
        rank, alpha = twice * self.trained.rank, twice * self.trained.alpha
        return replace(self.trained, rank=rank, alpha=alpha, variant=variant, pissa_niter=None)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules in the model."""
        return [name.removesuffix(".weight") for name in self.step.manifest.snapshot.names]

    def read(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module's adapter in float32, by their name in the module: ``lora_A.weight`` ``[r, n]``,
        ``lora_B.weight`` ``[m, r]``, and ``lora_magnitude_vector`` ``[m]`` of DoRA."""
        try:
            return self._read(module)
        except FileNotFoundError:
            raise removed(self.step) from None

    def _read(self, module: str) -> dict[str, Tensor]:
        names = [name for name in self.step.manifest.parameters if name.startswith(f"{module}.lora_")]
        found = {name.removeprefix(f"{module}."): self._whole(name, "values") for name in names}
        if self.trained.variant == "pissa":
            a, b = (self._whole(f"{module}.{key}.weight", "initial") for key in ("lora_A", "lora_B"))
            found["lora_A.weight"] = torch.cat([found["lora_A.weight"], a])
            found["lora_B.weight"] = torch.cat([found["lora_B.weight"], -b], dim=1)
        return found

    def merged(self, module: str, weight: Tensor) -> Tensor:
        """``[m, n]`` float32: a module's matrix of the base model with its adapter."""
        return adapters.merged(self.settings, weight, self.read(module))

    def shape(self, module: str) -> tuple[int, int]:
        """``m``, ``n`` of a module's matrix."""
        shapes: Mapping[str, list[int]] = {
            key: self.step.manifest.parameters[f"{module}.{key}.weight"].shape for key in ("lora_A", "lora_B")
        }
        return shapes["lora_B"][0], shapes["lora_A"][1]

    def _whole(self, name: str, key: str) -> Tensor:
        rows, columns = self.step.manifest.parameters[name].shape
        values = self.step.whole(name, key).float()
        return values if name.endswith("lora_magnitude_vector") else values.view(rows, columns)


def removed(step: Step) -> UserError:
    """Says that the files of a checkpoint are not there any more."""
    return UserError(f"{step.folder}: was removed during the export; a file named keep in a checkpoint prevents that")


def of_step(step: Step) -> Adapters | None:
    """The adapters of a checkpoint; None if the run has another method."""
    config = OmegaConf.create(step.manifest.provenance.config)
    if OmegaConf.select(config, "method") != "lora":
        return None
    given = OmegaConf.select(config, "lora", default={})
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoraConfig), given))
    assert isinstance(settings, LoraConfig)
    return Adapters(step, settings, bool(OmegaConf.select(config, "model.trust_remote_code")))
