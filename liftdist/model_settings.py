"""The settings of the model: which it is, in which dtypes it is held, and what its layers keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from liftdist.schema_tree import NOTHING, STATE, Problem, setting

SELECTIVE = "selective"


@dataclass
class ModelConfig:
    path: str = setting(
        MISSING, "folder of a Hugging Face causal language model, or its name on the hub", changes=NOTHING
    )
    revision: str | None = setting(
        None, "commit, tag or branch of a model on the hub; its main branch if unset", changes=NOTHING
    )
    dtype: str = setting(
        "bfloat16", "dtype of the weights and of the computation", choices=("bfloat16", "float32"), changes=STATE
    )
    base_dtype: str | None = setting(
        None,
        "keep and gather the decoder's matrices in 8 or 4 bits: int8 and nf4 in blocks of 64 weights, fp8 by rows; what is "
        "trained stays exact",
        choices=("int8", "fp8", "nf4"),
        refused=dict.fromkeys(
            ("bfloat16", "float32", "none"), "is no quantised format: leave it out for weights in model.dtype"
        ),
        changes=STATE,
    )
    attn_implementation: str | None = setting(
        None, "attention implementation, as transformers names it; its default if unset", changes=NOTHING
    )
    activation_checkpointing: bool | int | str = setting(
        False,
        "recompute decoder layers in backward instead of keeping their activations: `true` each layer, a number n every n-th, "
        "`selective` what each layer computes besides its products with weights and its attention, whose results are kept",
        changes=NOTHING,
    )
    offload_activations: bool = setting(
        False,
        "let what decoder layers keep for their backward lie on the host until then: with `model.activation_checkpointing` their "
        "inputs",
        changes=NOTHING,
    )
    keep_gathered: int = setting(
        0,
        "decoder layers, the last ones, whose gathered weights are kept from forward to backward: they are gathered once and not "
        "twice, and every rank holds them whole",
        at_least=0,
        changes=NOTHING,
    )
    compile: bool = setting(False, "`torch.compile` each decoder layer", changes=NOTHING)
    trust_remote_code: bool = setting(False, "run model code that comes with the weights", changes=NOTHING)

    @property
    def uses_flash_attention(self) -> bool:
        return "flash" in (self.attn_implementation or "")

    def problems(self) -> Iterator[Problem]:
        value = self.activation_checkpointing
        if value != SELECTIVE if isinstance(value, str) else value < 1 and value is not False:
            yield (
                "activation_checkpointing",
                f"must be true, false, {SELECTIVE}, or a whole number n, to recompute every n-th layer, got {value!r}",
            )
        if self.offload_activations and self.compile:
            yield "offload_activations", "must be false with model.compile, whose kernels decide what is kept"

    @property
    def recomputed_every(self) -> int:
        """Of so many layers, the first is recomputed; 0: none is."""
        return 1 if self.activation_checkpointing == SELECTIVE else int(self.activation_checkpointing)

    def lighter(self, on_gpu: bool = True) -> list[str]:
        """What would let layers keep less, as advice; nothing if they keep the least."""
        if self.recomputed_every != 1 or self.activation_checkpointing == SELECTIVE:
            return ["set model.activation_checkpointing=true"]
        return (
            ["set model.offload_activations=true"] if on_gpu and not (self.offload_activations or self.compile) else []
        )

    @property
    def keeps_less_by(self) -> list[str]:
        """The settings by which a layer keeps less on its device than what autograd saves."""
        return [f"model.{name}" for name in ("activation_checkpointing", "offload_activations") if getattr(self, name)]

    def identity(self, weights: str) -> str:
        """What tells the base model, as a run holds it, from others: the digest of its weights, and what they are rounded to."""
        return weights if self.base_dtype is None else f"{weights} in {self.base_dtype}"
