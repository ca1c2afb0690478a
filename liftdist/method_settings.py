"""Settings of what is trained and of what steps it: their names, meanings, defaults and bounds.

:mod:`liftdist.schema` has the others.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from liftdist.registry import BUDGETS, CRITERIA, OPTIMIZERS
from liftdist.schema_tree import FIXED, NOTHING, STATE, Problem, setting

BY_GRADIENTS = CRITERIA.having("gradients")
DECIDE_NUMBER = CRITERIA.having("number")
FACTORING = CRITERIA.having("factors")
MAGNITUDES = CRITERIA.having("magnitudes")


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
        None,
        "side of the blocks of `criterion=blocks`, 4 if unset; with `channels` the size of a head, of which channels are drawn "
        "together, 1 if unset",
        at_least=1,
        changes=STATE,
    )
    threshold: float | None = setting(
        None, "absolute value below which `criterion=threshold` trains a weight", above=0, changes=STATE
    )
    gradient_batches: int | None = setting(
        None,
        "batches of `train.micro_batch_size` sequences whose gradients `criterion=gradient`, `sensitivity` and `spiel` gather; 8 "
        "if unset, 5 with `spiel`",
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
    layers: int | None = setting(
        None, "decoder layers that `budget=layers` and `ist` train at a time", at_least=1, changes=STATE
    )
    shares: list[str] = setting(
        [],
        "for `budget=by_pattern`, `PATTERN=SHARE` of module names: the first that fits counts, others keep their share",
        pattern=r".+=(\d+\.?\d*|\.\d+)(e-?\d+)?",
        example='["*.down_proj=0.1", "*.q_proj=0"]',
        changes=STATE,
    )
    backward_flops: float | None = setting(
        None,
        "for `budget=greentrainer`, operations of a backward, of those of one that trains all matrices",
        above=0,
        at_most=1,
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
        None,
        "number of the refresh at which `final_density` is reached, or from which on `criterion=spiel` replaces nothing",
        at_least=1,
        changes=STATE,
    )
    modules: list[str] = setting(
        ["*"],
        "patterns (`*`, `?`, `[]`) of the linear modules to train; with `method=full`, of all modules with parameters",
        example='["*.mlp.*"]',
        changes=STATE,
    )

    @property
    def needs_data(self) -> str | None:
        """The setting, as ``KEY=VALUE``, by which a selection runs batches of data, if one does."""
        if self.criterion in BY_GRADIENTS:
            return f"criterion={self.criterion}"
        return f"budget={self.budget}" if self.budget == "ist" else None

    def conflicts(self) -> Iterator[Problem]:
        """What is wrong if weights are selected by these settings."""
        if self.criterion in DECIDE_NUMBER:
            if getattr(self, self.criterion) is None:
                yield self.criterion, f"must be given with selection.criterion={self.criterion}"
            decides = f"is not used: selection.{self.criterion} says how many weights are trained"
            for name in ("density", "budget_rank"):
                if getattr(self, name) is not None:
                    yield name, f"{decides}; unset it: selection.{name}="
            if self.budget != "per_matrix":
                yield "budget", f"{decides}; leave it out"
        elif self.budget in ("half", "layers", "greentrainer"):
            for name in ("density", "budget_rank"):
                if getattr(self, name) is not None:
                    yield (
                        name,
                        f"is not used: selection.budget={self.budget} trains whole matrices; unset it: selection.{name}=",
                    )
            if self.budget == "greentrainer" and self.criterion != "gradient":
                yield "criterion", "must be gradient with selection.budget=greentrainer, which goes by gradients"
            elif self.budget != "greentrainer" and self.criterion != "low_rank":
                yield "criterion", f"is not used: selection.budget={self.budget} trains whole matrices; leave it out"
        elif (self.density is None) == (self.budget_rank is None):
            given = "neither" if self.density is None else "both"
            key = "density" if given == "both" else ""
            yield key, f"set exactly one of selection.density and selection.budget_rank, got {given}"
        compares = self.budget in ("global_threshold", "sensitivity")
        if compares and self.criterion not in (*MAGNITUDES, *DECIDE_NUMBER):
            yield (
                "budget",
                f"{self.budget} compares scores of matrices, which those of selection.criterion={self.criterion} do not allow; "
                f"criteria that fit are {', '.join(MAGNITUDES)}",
            )
        if self.budget == "ist" and self.criterion == "spiel":
            yield (
                "budget",
                "cannot be ist with selection.criterion=spiel, which gives what is not drawn again its base values back; take "
                "another criterion",
            )
        if not self.modules:
            yield "modules", "must name at least one pattern"
        for name, of in (("block_size", ("blocks", "channels")), ("threshold", ("threshold",)), ("file", ("file",))):
            if getattr(self, name) is not None and self.criterion not in of:
                yield name, f"is used by selection.criterion={' and '.join(of)} alone; unset it: selection.{name}="
        if self.final_density is not None and self.budget != "sensitivity":
            yield "final_density", "is used by selection.budget=sensitivity alone; unset it: selection.final_density="
        if self.criterion == "spiel":
            if self.final_refresh is None:
                yield (
                    "final_refresh",
                    "must be given with selection.criterion=spiel, which replaces fewer weights each time",
                )
        elif (self.final_density is None) != (self.final_refresh is None):
            missing = "final_density" if self.final_density is None else "final_refresh"
            yield missing, "must be given where the other of selection.final_density and selection.final_refresh is"
        if self.final_refresh is not None and not self.refresh_interval:
            yield "final_refresh", "is not reached: selection.refresh_interval=0 selects once"
        if self.gradient_batches is not None and self.criterion not in BY_GRADIENTS:
            yield (
                "gradient_batches",
                f"is used by selection.criterion={', '.join(BY_GRADIENTS)} alone; unset it: selection.gradient_batches=",
            )
        if (
            self.seed is not None
            and self.criterion not in ("random", "channels")
            and self.budget not in ("half", "layers", "ist")
        ):
            yield "seed", "is used by what is drawn at random alone; unset it: selection.seed="
        if (self.layers is None) == (self.budget in ("layers", "ist")):
            yield "layers", "must be given with selection.budget=layers and ist, and with no other budget"
        if (self.backward_flops is None) == (self.budget == "greentrainer"):
            yield "backward_flops", "must be given with selection.budget=greentrainer, and with no other budget"
        if bool(self.shares) != (self.budget == "by_pattern"):
            yield "shares", "must be given with selection.budget=by_pattern, and with no other budget"


NEEDS_PEFT = "lora needs the library peft: pip install 'liftdist[lora]'"


@dataclass
class AdaLoraConfig:
    target_r: int | None = setting(
        None,
        "average rank that is kept, peft's `target_r`; two thirds of `lora.rank` if unset, as in the paper",
        at_least=1,
        changes=FIXED,
    )
    tinit: int = setting(0, "steps before ranks are dropped", at_least=0, changes=FIXED)
    tfinal: int = setting(0, "steps after the last are dropped", at_least=0, changes=FIXED)
    delta_t: int = setting(1, "steps between two drops, peft's `deltaT`", at_least=1, changes=FIXED)
    beta1: float = setting(0.85, "decay rate of importances", above=0, below=1, changes=FIXED)
    beta2: float = setting(0.85, "decay rate of how uncertain they are", above=0, below=1, changes=FIXED)
    orth_reg_weight: float = setting(0.5, "weight of the orthogonal regularisation in the loss", at_least=0)


@dataclass
class EvaConfig:
    rho: float = setting(
        2.0,
        "a module gets up to this many times `lora.rank`, by the variance that its ranks explain; 1 leaves all at `lora.rank`",
        at_least=1,
        changes=FIXED,
    )
    tau: float = setting(
        0.99, "cosine between two passes at which a vector has converged", at_least=0, at_most=1, changes=FIXED
    )
    batches: int = setting(
        8, "batches of `train.micro_batch_size` sequences whose inputs are decomposed", at_least=1, changes=FIXED
    )


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
        "LoRA; with learned magnitudes (`dora`); scaled for high ranks (`rslora`); of the principal components (`pissa`); one "
        "block for all parts of the input (`miss`); as many single weights at random places (`shira`); with ranks "
        "that are dropped where they matter least (`adalora`); or that start from the inputs of each module (`eva`)",
        choices=("lora", "dora", "rslora", "pissa", "adalora", "miss", "shira", "eva"),
        refused={
            "bone": "is called miss, as in peft: use lora.variant=miss, with lora.miss_init=bat for init_weights=bat",
            "supertuning": "trains single weights, as method=lift does: use that with selection.criterion=magnitude, or smallest "
            "for select_top=False, selection.density=1-sparsity and selection.refresh_interval=0, and export to shira; with a "
            "LoRA beside them (r) it is not offered",
        },
        changes=FIXED,
    )
    pissa_niter: int | None = setting(
        None,
        "iterations of a randomised factorisation for `variant=pissa`; a full SVD if unset",
        at_least=1,
        changes=FIXED,
    )

    miss_init: str | None = setting(
        None,
        "peft's `init_weights` of `variant=miss`: blocks that multiply the weights, too (`bat`), or that repeat `mini_r` columns "
        "(`mini`)",
        choices=("bat", "mini"),
        changes=FIXED,
    )
    mini_r: int | None = setting(
        None, "columns of the block of `miss_init=mini`, which needs them", at_least=1, changes=FIXED
    )

    adalora: AdaLoraConfig = field(default_factory=AdaLoraConfig)
    eva: EvaConfig = field(default_factory=EvaConfig)

    @property
    def places(self) -> int:
        """The highest rank that a module may get, for which its adapter is made."""
        return round(self.rank * self.eva.rho) if self.variant == "eva" else self.rank

    @property
    def final_rank(self) -> int:
        """The average rank that AdaLoRA keeps."""
        return max(1, 2 * self.rank // 3) if self.adalora.target_r is None else self.adalora.target_r

    def problems(self) -> Iterator[Problem]:
        if self.variant != "adalora" and self.adalora != AdaLoraConfig():
            yield "adalora", "is used by lora.variant=adalora alone; leave it out"
        if self.variant != "eva" and self.eva != EvaConfig():
            yield "eva", "is used by lora.variant=eva alone; leave it out"
        if self.variant == "adalora" and self.final_rank >= self.rank:
            yield "adalora.target_r", f"must be less than lora.rank={self.rank}, got {self.final_rank}"
        for name, of in (("pissa_niter", "pissa"), ("miss_init", "miss")):
            if getattr(self, name) is not None and self.variant != of:
                yield name, f"is used by lora.variant={of} alone; unset it: lora.{name}="
        if (self.mini_r is None) == (self.miss_init == "mini"):
            yield "mini_r", "must be given with lora.miss_init=mini, and with nothing else"
        if self.variant in ("miss", "shira") and self.alpha != LoraConfig.alpha:
            yield "alpha", f"is not used by lora.variant={self.variant}; leave it out"
        if self.dropout and (self.variant == "shira" or self.miss_init == "bat"):
            yield "dropout", f"is not used by {self.miss_init or self.variant}, which changes weights; leave it out"


@dataclass
class OptimizerConfig:
    name: str = setting(
        "adamw",
        "what steps the trained values",
        choices=tuple(OPTIMIZERS),
        refused=dict.fromkeys(
            ("muon", "shampoo", "soap", "adafactor", "galore"),
            "works on whole matrices, of which a rank steps single entries, or the rows of a shard",
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
    device: str | None = setting(
        None,
        "where trained values, their gradient, Adam's moments and indices are kept, and stepped: `cpu` is the host, which leaves "
        "a GPU's memory to the model; where the model is if unset",
        choices=("cpu",),
        changes=NOTHING,
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
