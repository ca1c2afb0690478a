"""Settings of what is trained and of what steps it: their names, meanings, defaults and bounds.

:mod:`liftdist.schema` has the others.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from liftdist.registry import BUDGETS, CRITERIA, OPTIMIZERS
from liftdist.schema_tree import FIXED, STATE, Problem, setting

BY_GRADIENTS = ("gradient", "sensitivity")  # criteria that need data


@dataclass
class SelectionConfig:
    density: float | None = setting(
        None, "fraction of each matrix to train; or set `budget_rank`", above=0, at_most=1, changes=STATE
    )
    budget_rank: int | None = setting(
        None, "train as many weights of each matrix as a LoRA of this rank; or set `density`", at_least=1, changes=STATE
    )
    criterion: str = setting(
        "low_rank", "rule that selects the weights to train in a matrix", choices=tuple(CRITERIA), changes=STATE
    )
    budget: str = setting(
        "per_matrix", "rule for the number of weights to train in each matrix", choices=tuple(BUDGETS), changes=STATE
    )
    filter_rank: int = setting(
        64, "rank of the approximation whose largest entries are principal", at_least=1, changes=STATE
    )
    refresh_interval: int = setting(
        400, "optimizer steps between two selections; 0 selects once", at_least=0, changes=STATE
    )
    method: str = setting(
        "fast", "how a matrix is factored; `exact` is a full SVD", choices=("fast", "exact"), changes=STATE
    )
    block_size: int | None = setting(
        None, "side of the blocks of `criterion=blocks`; 4 if unset", at_least=1, changes=STATE
    )
    threshold: float | None = setting(
        None, "absolute value below which `criterion=threshold` trains a weight", above=0, changes=STATE
    )
    gradient_batches: int | None = setting(
        None,
        "batches of `train.micro_batch_size` sequences whose gradients `criterion=gradient` and `sensitivity` gather; 8 if unset",
        at_least=1,
        changes=STATE,
    )
    file: str | None = setting(
        None,
        "what names the weights of `criterion=file`: a delta file, a run directory, or a selection in the cache",
        changes=STATE,
    )
    exclude: list[str] = setting(
        [],
        "delta files whose weights must not be trained, whatever the criterion",
        example="[first.delta, second.delta]",
        changes=STATE,
    )
    seed: int | None = setting(
        None, "seeds what is drawn at random; 0 if unset", at_least=0, at_most=2**32 - 1, changes=STATE
    )
    layers: int | None = setting(None, "decoder layers that `budget=layers` trains", at_least=1, changes=STATE)
    shares: list[str] = setting(
        [],
        "for `budget=by_pattern`, `PATTERN=SHARE` of module names: the first that fits counts, others keep their share",
        pattern=r".+=(\d+\.?\d*|\.\d+)(e-?\d+)?",
        example='["*.down_proj=0.1", "*.q_proj=0"]',
        changes=STATE,
    )
    final_density: float | None = setting(
        None,
        "for `budget=sensitivity`, fraction of the weights to train from refresh `final_refresh` on; reached by a cubic curve",
        above=0,
        at_most=1,
        changes=STATE,
    )
    final_refresh: int | None = setting(
        None, "number of the refresh at which `final_density` is reached", at_least=1, changes=STATE
    )
    modules: list[str] = setting(
        ["*"],
        "patterns (`*`, `?`, `[]`) of the linear modules to train; with `method=full`, of all modules with parameters",
        example='["*.mlp.*"]',
        changes=STATE,
    )

    def conflicts(self) -> Iterator[Problem]:
        """What is wrong if weights are selected by these settings."""
        if self.criterion in ("threshold", "file"):  # settings of the same names
            if getattr(self, self.criterion) is None:
                yield self.criterion, f"must be given with selection.criterion={self.criterion}"
            decides = f"is not used: selection.{self.criterion} says how many weights are trained"
            for name in ("density", "budget_rank"):
                if getattr(self, name) is not None:
                    yield name, f"{decides}; unset it: selection.{name}="
            if self.budget != "per_matrix":
                yield "budget", f"{decides}; leave it out"
        elif self.budget in ("half", "layers"):
            for name in ("density", "budget_rank"):
                if getattr(self, name) is not None:
                    yield (
                        name,
                        f"is not used: selection.budget={self.budget} trains whole matrices; unset it: selection.{name}=",
                    )
            if self.criterion != "low_rank":
                yield "criterion", f"is not used: selection.budget={self.budget} trains whole matrices; leave it out"
        elif (self.density is None) == (self.budget_rank is None):
            given = "neither" if self.density is None else "both"
            key = "density" if given == "both" else ""
            yield key, f"set exactly one of selection.density and selection.budget_rank, got {given}"
        if not self.modules:
            yield "modules", "must name at least one pattern"
        for name, of in (("block_size", "blocks"), ("threshold", "threshold"), ("file", "file")):
            if getattr(self, name) is not None and self.criterion != of:
                yield name, f"is used by selection.criterion={of} alone; unset it: selection.{name}="
        if self.final_density is not None and self.budget != "sensitivity":
            yield "final_density", "is used by selection.budget=sensitivity alone; unset it: selection.final_density="
        if (self.final_density is None) != (self.final_refresh is None):
            missing = "final_density" if self.final_density is None else "final_refresh"
            yield missing, "must be given where the other of selection.final_density and selection.final_refresh is"
        if self.final_refresh is not None and not self.refresh_interval:
            yield "final_refresh", "is not reached: selection.refresh_interval=0 selects once"
        if self.gradient_batches is not None and self.criterion not in BY_GRADIENTS:
            yield (
                "gradient_batches",
                f"is used by selection.criterion={' and '.join(BY_GRADIENTS)} alone; unset it: selection.gradient_batches=",
            )
        if (
            self.seed is not None
            and self.criterion not in ("random", "channels")
            and self.budget not in ("half", "layers")
        ):
            yield "seed", "is used by what is drawn at random alone; unset it: selection.seed="
        if (self.layers is None) == (self.budget == "layers"):
            yield "layers", "must be given with selection.budget=layers, and with no other budget"
        if bool(self.shares) != (self.budget == "by_pattern"):
            yield "shares", "must be given with selection.budget=by_pattern, and with no other budget"


NEEDS_PEFT = "lora needs the library peft: pip install 'liftdist[lora]'"


@dataclass
class LoraConfig:
    rank: int = setting(8, "rank of the adapters, peft's `r`", at_least=1, changes=FIXED)
    alpha: int = setting(
        8,
        "peft's `lora_alpha`: adapters are multiplied by alpha / rank, with `variant=rslora` by alpha / sqrt(rank)",
        at_least=1,
        changes=FIXED,
    )
    dropout: float = setting(0.0, "probability of dropout before the adapters", at_least=0, below=1)
    modules: list[str] = setting(
        [],
        "patterns (`*`, `?`, `[]`) of the linear modules that get adapters; `selection.modules` if empty",
        example='["*.mlp.*"]',
        changes=FIXED,
    )
    variant: str = setting(
        "lora",
        "LoRA; with learned magnitudes (`dora`); scaled for high ranks (`rslora`); or of the principal components (`pissa`)",
        choices=("lora", "dora", "rslora", "pissa"),
        refused={
            "adalora": "moves rank between modules by scores of whole matrices, of which a rank has its rows",
            "eva": "starts from the inputs of every module, which must be collected on the whole model first",
            "miss": "has no factors that servers know; use one of these",
            "shira": "trains single weights: use method=lift with selection.criterion=random, and export to shira",
        },
        changes=FIXED,
    )
    pissa_niter: int | None = setting(
        None,
        "iterations of a randomised factorisation for `variant=pissa`; a full SVD if unset",
        at_least=1,
        changes=FIXED,
    )

    def problems(self) -> Iterator[Problem]:
        if self.pissa_niter is not None and self.variant != "pissa":
            yield "pissa_niter", "is used by lora.variant=pissa alone; unset it: lora.pissa_niter="


@dataclass
class OptimizerConfig:
    name: str = setting(
        "adamw",
        "what steps the trained values",
        choices=tuple(OPTIMIZERS),
        refused=dict.fromkeys(
            ("muon", "shampoo", "soap", "adafactor", "galore"),
            "works on whole matrices; what is trained is some of their entries",
        ),
        changes=STATE,
    )
    lr: float = setting(2e-4, "peak learning rate", above=0)
    betas: list[float] = setting(
        [0.9, 0.95], "decay rates of Adam's two moments", at_least=0, below=1, example="[0.9, 0.95]"
    )
    eps: float = setting(1e-6, "Adam's epsilon", above=0)
    momentum: float | None = setting(
        None, "decay rate of the momentum of `name=sgd`; 0.9 if unset", at_least=0, below=1
    )
    bias_correction: str = setting(
        "step",
        "which steps Adam's moments are corrected for: those of the run, or of each `entry` since it was selected",
        choices=("step", "entry"),
        changes=STATE,
    )
    weight_decay: float = setting(
        0.0, "decoupled weight decay of what is trained; with `method=full` and `lora` not of vectors", at_least=0
    )
    decay_towards: str = setting(
        "zero", "where weight decay pulls: to zero, or to the values of the base model", choices=("zero", "base")
    )
    dtype: str = setting(
        "float32",
        "dtype of the trained values and of Adam's moments; `bfloat16` keeps no more of them than the model's weights do, and "
        "loses updates that these would round away",
        choices=("float32", "bfloat16"),
        changes=STATE,
    )
    max_grad_norm: float | None = setting(None, "clip the gradient of what is trained to this global norm", above=0)
    schedule: str = setting(
        "linear",
        "learning rate after the warm-up: decays to zero, or stays constant",
        choices=("linear", "cosine", "constant"),
    )
    warmup_ratio: float = setting(
        0.03,
        "fraction of the steps in which the learning rate rises; it is zero in the first step",
        at_least=0,
        at_most=1,
    )
    reference_numerics: bool = setting(
        False,
        "as the LIFT authors do, add epsilon to the uncorrected denominator, and round the warm-up down to whole steps",
    )

    def problems(self) -> Iterator[Problem]:
        if len(self.betas) != 2:
            yield "betas", f"must be two numbers, got {self.betas}"
        if self.name != "adamw":
            default = OptimizerConfig()
            for name in ("betas", "eps", "bias_correction", "reference_numerics"):
                if getattr(self, name) != getattr(default, name):
                    yield name, f"is not used by optimizer.name={self.name}; leave it out"
        elif self.momentum is not None:
            yield "momentum", "is not used by optimizer.name=adamw, which has betas; unset it: optimizer.momentum="
        if self.bias_correction == "entry":
            if self.reference_numerics:
                yield "bias_correction", "must be step with optimizer.reference_numerics"
            if self.dtype != "float32":
                yield (
                    "bias_correction",
                    "entry needs optimizer.dtype=float32: a number of steps has no room in bfloat16",
                )
        if self.decay_towards == "base" and not self.weight_decay:
            yield "decay_towards", "base has no effect without optimizer.weight_decay"
