"""Settings of a run: their names, meanings, defaults and bounds, and how a change affects a run that continues.

:mod:`liftdist.config` reads them. Imports no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from omegaconf import MISSING

from liftdist.data_settings import DataConfig
from liftdist.errors import UserError
from liftdist.evaluation_settings import EvalConfig
from liftdist.method_settings import (
    DECIDE_NUMBER,
    FACTORING,
    NEEDS_PEFT,
    LoraConfig,
    OptimizerConfig,
    SelectionConfig,
)
from liftdist.model_settings import ModelConfig
from liftdist.registry import LOSSES, METHODS, TRACKERS
from liftdist.schema_tree import FIXED, NOTHING, Problem, setting, walk
from liftdist.signals import STOP_SIGNALS
from liftdist.slurm_settings import SlurmConfig

TURN = 10


@dataclass
class TrainConfig:
    loss: str = setting("cross_entropy", "loss of the labelled tokens", choices=tuple(LOSSES))
    loss_reduction: str = setting(
        "token",
        "mean over all labelled tokens of a step's batch, or over its samples of each sample's own mean",
        choices=("token", "sequence"),
    )
    label_smoothing: float = setting(
        0.0, "share of each label that is spread evenly over the vocabulary", at_least=0, below=1
    )
    z_loss: float = setting(0.0, "factor of the squared log of the softmax's normaliser, added to the loss", at_least=0)
    kl_weight: float | None = setting(
        None, "factor of the divergence from the base model in `loss=asft`; 0.1 if unset, 0 makes it `dft`", at_least=0
    )
    mask_probability: float | None = setting(
        None,
        "probability with which `loss=masked_thought` replaces a response token of the input; 0.4 if unset",
        above=0,
        at_most=1,
    )
    mask_warmup: float | None = setting(
        None, "share of the steps over which that probability rises from 0; 0.66 if unset", at_least=0, at_most=1
    )
    mask_token: str | None = setting(
        None, "token that stands in place of replaced ones; the tokenizer's mask token if unset"
    )
    epochs: int = setting(1, "passes over the data", at_least=1)
    steps: int | None = setting(None, "optimizer steps; overrides `epochs`", at_least=1)
    batch_size: int = setting(16, "sequences per optimizer step, over all ranks", at_least=1)
    micro_batch_size: int = setting(4, "sequences per forward and backward of a rank", at_least=1, changes=NOTHING)
    fit_memory: bool = setting(
        False,
        "choose `train.micro_batch_size`, and `model.activation_checkpointing` (`false`, `selective`, 2 or `true`) and "
        "`model.keep_gathered` unless they are set, by the plan: the largest micro-batch that fits the memory of a rank",
        changes=NOTHING,
    )
    seed: int = setting(0, "seeds the order of the samples", at_least=0, at_most=2**32 - 1)
    eval_interval: int = setting(
        0, "steps between evaluations; 0: only before and after training", at_least=0, changes=NOTHING
    )
    patience: int | None = setting(
        None,
        "evaluations in a row without a better value of `checkpoint.best` after which training ends",
        at_least=1,
        changes=NOTHING,
    )
    eval_kl: bool = setting(
        False,
        "measure at each evaluation how far the model is from the base model on held-out data, which takes two forwards more",
        changes=NOTHING,
    )
    log_interval: int = setting(1, "steps between two entries in the metrics", at_least=1, changes=NOTHING)
    deterministic: bool = setting(
        False, "use deterministic GPU kernels, which are slower; CPU kernels are always deterministic", changes=NOTHING
    )
    export: bool = setting(True, "write the fine-tuned model as a Hugging Face folder at the end", changes=NOTHING)
    max_skipped_steps: int = setting(
        10, "consecutive steps that may be skipped because loss or gradient is not finite", at_least=0, changes=NOTHING
    )
    stop_signals: list[str] = setting(
        list(STOP_SIGNALS),
        "signals that make the run save and stop",
        choices=STOP_SIGNALS,
        example="[SIGTERM, SIGUSR1]",
        changes=NOTHING,
    )
    hang_timeout: float = setting(
        480.0,
        "seconds without progress after which a rank writes its stacks and ends the run; 0 disables it",
        at_least=0,
        changes=NOTHING,
    )

    variants: dict[str, str] = setting(
        {},
        "runs in place of this one, which share a model: the name of each, whose directory is `run_dir/NAME`, and its overrides",
        example="{low: optimizer.lr=1e-4, high: optimizer.lr=4e-4 train.seed=1}",
        changes=NOTHING,
    )
    turn: int = setting(TURN, "steps that each of `variants` trains at a time", at_least=1, changes=NOTHING)

    @property
    def needs_base(self) -> bool:
        """Whether the loss compares with the base model."""
        return self.loss == "asft" and self.kl_weight != 0

    def problems(self) -> Iterator[Problem]:
        for name, losses in _OF_LOSSES.items():
            if getattr(self, name) != getattr(TrainConfig, name) and self.loss not in losses:
                yield name, f"is not used by train.loss={self.loss}, but by {' and '.join(losses)} alone; leave it out"
        if self.turn != TURN and not self.variants:
            yield "turn", "is used with train.variants alone; leave it out"


#: Settings that not every loss uses, and those that do.
_OF_LOSSES = {
    "label_smoothing": ("cross_entropy", "masked_thought"),
    "z_loss": ("cross_entropy", "masked_thought"),
    "kl_weight": ("asft",),
    "mask_probability": ("masked_thought",),
    "mask_warmup": ("masked_thought",),
    "mask_token": ("masked_thought",),
}


@dataclass
class MetricsConfig:
    trackers: list[str] = setting(
        ["tensorboard"],
        "where metrics go besides `metrics.jsonl`",
        choices=tuple(name for name in TRACKERS if name != "jsonl"),
        example="[tensorboard, wandb]",
        changes=NOTHING,
    )
    images: bool = setting(
        False,
        "draw where principal weights lie, at each refresh, and at the end how they changed, as images in TensorBoard; needs "
        "`liftdist[report]`",
        changes=NOTHING,
    )

    def problems(self) -> Iterator[Problem]:
        if len(set(self.trackers)) < len(self.trackers):
            yield "trackers", f"names one twice: {', '.join(self.trackers)}"
        if self.images and "tensorboard" not in self.trackers:
            yield "images", "are those of TensorBoard: add tensorboard to metrics.trackers, or leave it out"
        if self.images and importlib.util.find_spec("matplotlib") is None:
            yield "images", "needs the library matplotlib: pip install 'liftdist[report]'"
        for name in self.trackers:
            if name == "tensorboard":
                continue  # comes with liftdist
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:  # a folder that the client has written, perhaps
                yield "trackers", f"{name} needs its client: pip install 'liftdist[{name}]'"


@dataclass
class CheckpointConfig:
    interval: int = setting(
        100, "steps between checkpoints; 0: only at a stop and at the end", at_least=0, changes=NOTHING
    )
    keep: int = setting(
        2, "newest checkpoints to keep, besides those that hold a file named `keep`", at_least=1, changes=NOTHING
    )
    best: str | None = setting(
        None,
        "figure of an evaluation whose best step is kept, too, and exported beside the last: `eval/loss`, `eval/gsm8k/accuracy`",
        pattern=r"eval/.+",
        example="eval/loss",
        changes=NOTHING,
    )
    best_of: str = setting(
        "auto",
        "whether its least or its greatest value is the best; `auto`: the least of a loss, a perplexity or a divergence",
        choices=("auto", "min", "max"),
        changes=NOTHING,
    )

    def problems(self) -> Iterator[Problem]:
        if self.best is None and self.best_of != "auto":
            yield "best_of", "is used with checkpoint.best alone; leave it out"


@dataclass
class SyncConfig:
    to: str | None = setting(
        None, "folder in which the run publishes its weights as versions, for others to follow", changes=NOTHING
    )
    interval: int = setting(10, "steps between versions; the end of the run is one, too", at_least=1, changes=NOTHING)
    keep: int = setting(10, "newest versions to keep", at_least=1, changes=NOTHING)
    full_interval: int = setting(
        1, "versions from one with all changes to the base model to the next", at_least=1, changes=NOTHING
    )


@dataclass
class MeshConfig:
    dp_replicate: int = setting(1, "replicas of the sharded model, usually one per node", at_least=1, changes=NOTHING)
    sparse_reduce_scatter: bool = setting(
        True, "reduce only the principal entries of gradients inside a replica, too", changes=NOTHING
    )
    timeout_minutes: float = setting(
        10.0, "minutes after which a collective that has not finished ends the run", above=0, changes=NOTHING
    )

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.timeout_minutes)

    def layout(self, world_size: int) -> tuple[int, int]:
        """``(replicas, shards)``. Raises ``UserError`` if ``world_size`` is not a multiple of ``dp_replicate``."""
        if world_size % self.dp_replicate:
            raise UserError(
                f"mesh: {world_size} ranks cannot be {self.dp_replicate} replicas (mesh.dp_replicate) of equal size; "
                f"start a multiple of {self.dp_replicate}"
            )
        return self.dp_replicate, world_size // self.dp_replicate


@dataclass
class Config:
    run_dir: str = setting(
        MISSING, "folder for everything this run writes; if it holds a run already, that run continues", changes=NOTHING
    )
    cache_dir: str = setting(
        "~/.cache/liftdist", "folder for tokenised data, selections and digests, shared by runs", changes=NOTHING
    )
    method: str = setting("lift", "what is trained, and how", choices=tuple(METHODS), changes=FIXED)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def keeps_base(self) -> bool:
        """Whether the base values of trained weights are needed in training."""
        replaces = self.method == "lift" and (self.selection.criterion == "spiel" or self.selection.budget == "ist")
        return replaces or self.optimizer.decay_towards == "base" or self.train.needs_base or self.train.eval_kl

    def problems(self) -> Iterator[Problem]:
        if self.model.base_dtype is not None and self.method != "lift":
            yield "model.base_dtype", f"is for method=lift: method={self.method} has no frozen matrices that stay exact"
        if self.model.base_dtype is not None and self.eval.server is not None:
            yield (
                "eval.server",
                "holds the run's export, which is on the original weights, not on those of model.base_dtype; serve the folder of "
                "`liftdist export --format as_trained`, and ask it as a model of its own",
            )
        if self.method == "lift":
            if (needs_data := self.selection.needs_data) and self.train.needs_base:
                yield "train.loss", f"cannot be {self.train.loss} with selection.{needs_data}"
            yield from (
                (f"selection.{name}" if name else "selection", found) for name, found in self.selection.conflicts()
            )
            if self.train.fit_memory and self.selection.criterion in DECIDE_NUMBER:
                yield (
                    "train.fit_memory",
                    f"must be false with selection.criterion={self.selection.criterion}: how many weights are trained, and the "
                    "memory that they take, is known when they are selected; set train.micro_batch_size",
                )
        else:
            yield from self._lacking()
        gathering = (
            [f"selection.{self.selection.needs_data}"] if self.method == "lift" and self.selection.needs_data else []
        )
        gathering += ["lora.variant=eva"] if self.method == "lora" and self.lora.variant == "eva" else []
        for name in gathering if self.train.fit_memory else ():
            yield (
                "train.fit_memory",
                f"must be false with {name}: its batches are of train.micro_batch_size, so that memory would decide what is "
                "trained; set that",
            )
        if self.method == "lora" and self.lora.variant == "eva" and self.train.needs_base:
            yield "train.loss", f"cannot be {self.train.loss} with lora.variant=eva"
        if self.method == "lora" and importlib.util.find_spec("peft") is None:
            yield "method", NEEDS_PEFT
        if self.method == "lora" and self.sync.to is not None:
            yield "sync.to", "cannot be with method=lora: adapters change all weights of their modules; leave it out"
        if self.train.variants:
            if self.method != "lift":
                yield "method", "must be lift with train.variants: no other method leaves the model as it was"
            if self.model.base_dtype is not None:
                yield "model.base_dtype", "must be unset with train.variants: what one has trained would stay exact"
            if self.train.fit_memory:
                yield (
                    "train.fit_memory",
                    "must be false with train.variants: it plans one run; set train.micro_batch_size",
                )
            if self.model.compile:
                yield (
                    "model.compile",
                    "must be false with train.variants: shapes that one meets would decide the kernels",
                )
        yield from self._never_better()
        if self.train.patience is not None and self.checkpoint.best is None:
            yield "train.patience", "needs checkpoint.best, the figure that must get better"
        if self.train.eval_kl and not (self.data.eval_path or self.data.eval_sources or self.data.eval_share):
            yield "train.eval_kl", "needs held-out data: give data.eval_path, data.eval_sources or data.eval_share"
        if self.optimizer.dtype == "bfloat16" and self.model.dtype == "float32":
            yield "optimizer.dtype", "must be float32 with model.dtype=float32, or set model.dtype=bfloat16"
        of_one = self.train.fit_memory or self.train.micro_batch_size == 1
        if self.data.packing and self.model.uses_flash_attention and not of_one:
            yield (
                "train.micro_batch_size",
                "must be 1 with data.packing and flash attention (raise data.max_length instead), "
                f"got {self.train.micro_batch_size}",
            )

    def _never_better(self) -> Iterator[Problem]:
        """A best step that is looked for where the last one is the only one of which the figure is known."""
        best = self.checkpoint.best or ""
        of_set = best.endswith("/loss")  # of held-out data, which may be called as a task is
        of_task = [task for task in self.eval.tasks if best.split("/")[1:2] == [task.title] and not of_set]
        key, interval = (
            ("eval.interval", self.eval.interval) if of_task else ("train.eval_interval", self.train.eval_interval)
        )
        known = [figure for task in of_task for figure in task.figures()]
        if known and not any(best in (figure, f"{figure}/low", f"{figure}/high") for figure in known):
            yield "checkpoint.best", f"must be a figure of the task: {' or '.join(known)}, got {best}"
        if best and not interval:
            yield "checkpoint.best", f"needs {key}, the steps between two looks at {best}"

    def _lacking(self) -> Iterator[Problem]:
        """What methods that train whole parameters do not have."""
        if self.optimizer.name != "adamw":
            yield "optimizer.name", f"must be adamw with method={self.method}"
        if self.optimizer.device is not None:
            yield "optimizer.device", f"is for method=lift: method={self.method} trains weights where the model is"
        if self.optimizer.bias_correction != "step":
            yield (
                "optimizer.bias_correction",
                f"must be step with method={self.method}: no weight is selected later than others",
            )
        if self.selection.exclude:
            yield (
                "selection.exclude",
                f"leaves weights alone with method=lift only: method={self.method} changes all weights of a module",
            )
        is_lora = self.method == "lora"
        has_base = is_lora and self.lora.variant != "pissa"  # without its adapters
        if is_lora and self.optimizer.decay_towards == "base":
            yield (
                "optimizer.decay_towards",
                "must be zero with method=lora: without adapters the model is the base model",
            )
        for name, is_asked in (
            ("optimizer.decay_towards", self.optimizer.decay_towards == "base" and not is_lora),
            ("train.loss", self.train.needs_base and not has_base),
            ("train.eval_kl", self.train.eval_kl and not has_base),
        ):
            if is_asked:
                what = f"lora.variant={self.lora.variant}" if is_lora else f"method={self.method}"
                yield name, f"needs the values of the base model, which {what} does not keep; leave it out"
        if is_lora and self.lora.modules and self.selection.modules != ["*"]:
            yield "lora.modules", "is given, and selection.modules, too; leave one of them out"

    def unused(self) -> dict[str, list[str]]:
        """Settings that nothing reads, ``KEY=VALUE`` of each, by the reason."""
        held_out = bool(self.data.eval_path or self.data.eval_sources)
        chosen, is_lift = self.selection, self.method == "lift"
        takes_all = is_lift and chosen.budget in ("half", "layers")
        by = f"by selection.budget={chosen.budget}" if takes_all else f"by selection.criterion={chosen.criterion}"
        factors_nothing = is_lift and (takes_all or chosen.criterion not in FACTORING)
        idle = {  # settings, or sections
            "selection": (not is_lift, f"by method={self.method}"),
            "selection.filter_rank": (factors_nothing, by),
            "selection.method": (factors_nothing, by),
            "selection.refresh_interval": (is_lift and chosen.criterion == "file", by),
            "mesh.sparse_reduce_scatter": (not is_lift, f"by method={self.method}"),
            "lora": (self.method != "lora", f"by method={self.method}"),
            "sync": (self.sync.to is None, "without sync.to"),
            "train.eval_interval": (not (held_out or self.data.eval_share), "without held-out data"),
            "data.eval_split": (not held_out, "without data.eval_path"),
            "eval.interval": (not self.eval.tasks, "without eval.tasks"),
            "slurm.container_mounts": (self.slurm.container is None, "without slurm.container"),
            "slurm.container_runtime": (self.slurm.container is None, "without slurm.container"),
        }
        defaults = {key: value for key, _, value in walk(Config())}
        found = dict[str, list[str]]()
        for key, _, value in walk(self):
            places = [idle.get(name, (False, "")) for name in (key.partition(".")[0], key)]
            reason = next((reason for is_idle, reason in places if is_idle), None)
            if reason is not None and key != "selection.modules" and value != defaults[key]:  # that is of all methods
                found.setdefault(reason, []).append(f"{key}={value}")
        return found
