"""Settings: what they are called, what they mean, their defaults and bounds, and what a change of one changes.

Reading them is :mod:`liftdist.config`'s, from which the rest of the package takes these names. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import MISSING

EXIT_USER_ERROR = 2  # exit code for anything the user can put right
EXIT_STOPPED = 75  # exit code of a run that stopped when asked to: the same command continues it
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


# what a changed setting changes in a run that continues, see changes.py
NOTHING = "nothing"  # that the losses would show, but for the order of summation
COURSE = "course"  # how training goes on from here
STATE = "state"  # what the saved state means


class UserError(ValueError):
    """Something the user can put right. Shown as one line, without a traceback, with exit code 2."""


def _setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    pattern: str | None = None,
    changes: str = COURSE,
) -> Any:
    metadata = dict(help=help, choices=choices, at_least=at_least, at_most=at_most, above=above, below=below)
    metadata |= dict(pattern=pattern, changes=changes)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = _setting(
        MISSING, "folder of a Hugging Face causal language model, or its name on the hub", changes=NOTHING
    )
    dtype: str = _setting(
        "bfloat16", "dtype of the weights and of the computation", choices=("bfloat16", "float32"), changes=STATE
    )
    attn_implementation: str | None = _setting(
        None, "attention kernel, as transformers names it; its own choice if unset", changes=NOTHING
    )
    activation_checkpointing: bool = _setting(
        False, "recompute each decoder layer in backward instead of keeping it", changes=NOTHING
    )
    compile: bool = _setting(False, "`torch.compile` each decoder layer", changes=NOTHING)
    trust_remote_code: bool = _setting(False, "run model code that comes with the weights", changes=NOTHING)


@dataclass
class DataConfig:
    path: str = _setting(MISSING, "training data: a .jsonl, .json or .parquet file, or a data set name on the hub")
    eval_path: str | None = _setting(
        None, "held-out data for the evaluation loss, given as `data.path` is", changes=NOTHING
    )
    subset: str | None = _setting(None, "configuration name of a hub data set")
    split: str = _setting("train", "split of a hub data set to train on")
    eval_split: str = _setting("test", "split of a hub data set to evaluate on", changes=NOTHING)
    format: str = _setting(
        "auto",
        "fields of a record: instruction/input/output, prompt/completion, messages, or conversations; "
        "`auto` tells by the first record",
        choices=("auto", "alpaca", "prompt_completion", "messages", "sharegpt"),
    )
    max_length: int = _setting(2048, "longest sequence, in tokens", at_least=2)
    overlong: str = _setting(
        "truncate", "what to do with longer samples; both are counted", choices=("truncate", "drop")
    )
    packing: bool = _setting(False, "fill sequences up to `max_length` with several samples that do not see each other")


@dataclass
class SelectionConfig:
    density: float | None = _setting(
        None, "share of each matrix to train; or set `budget_rank`", above=0, at_most=1, changes=STATE
    )
    budget_rank: int | None = _setting(
        None, "train as many weights of each matrix as a LoRA of this rank; or set `density`", at_least=1, changes=STATE
    )
    filter_rank: int = _setting(
        64, "rank of the approximation whose largest entries are principal", at_least=1, changes=STATE
    )
    refresh_interval: int = _setting(
        400, "optimizer steps between two selections; 0 selects once", at_least=0, changes=STATE
    )
    method: str = _setting(
        "fast", "how a matrix is factored; `exact` is a full SVD", choices=("fast", "exact"), changes=STATE
    )
    modules: list[str] = _setting(["*"], "patterns (`*`, `?`, `[]`) of the linear modules to train", changes=STATE)


@dataclass
class OptimizerConfig:
    lr: float = _setting(2e-4, "peak learning rate", above=0)
    betas: list[float] = _setting([0.9, 0.95], "decay rates of Adam's two moments", at_least=0, below=1)
    eps: float = _setting(1e-6, "Adam's epsilon", above=0)
    weight_decay: float = _setting(0.0, "decoupled weight decay of the principal weights", at_least=0)
    max_grad_norm: float | None = _setting(None, "clip the principal gradient to this global norm", above=0)
    schedule: str = _setting(
        "linear", "learning rate after the warm-up: falls to zero, or stays", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = _setting(
        0.03, "share of the steps in which the rate rises; it is zero in the first", at_least=0, at_most=1
    )
    reference_numerics: bool = _setting(False, "add epsilon to the uncorrected denominator, as the LIFT authors do")


@dataclass
class TrainConfig:
    epochs: int = _setting(1, "passes over the data", at_least=1)
    steps: int | None = _setting(None, "optimizer steps; replaces `epochs`", at_least=1)
    batch_size: int = _setting(16, "sequences of one optimizer step, over all ranks", at_least=1)
    micro_batch_size: int = _setting(4, "sequences a rank computes at once", at_least=1, changes=NOTHING)
    seed: int = _setting(0, "seeds the order of the samples", at_least=0, at_most=2**32 - 1)
    eval_interval: int = _setting(0, "steps between evaluations; 0: before and after only", at_least=0, changes=NOTHING)
    log_interval: int = _setting(1, "steps between two entries of the metrics", at_least=1, changes=NOTHING)
    deterministic: bool = _setting(
        False, "deterministic GPU kernels, slower; CPUs are deterministic anyway", changes=NOTHING
    )
    export: bool = _setting(True, "write the fine-tuned model as a Hugging Face folder at the end", changes=NOTHING)
    max_skipped_steps: int = _setting(
        10, "steps in a row whose loss or gradient may be not finite: they change nothing", at_least=0, changes=NOTHING
    )
    stop_signals: list[str] = _setting(
        list(STOP_SIGNALS), "signals that make the run save and stop", choices=STOP_SIGNALS, changes=NOTHING
    )
    hang_timeout: float = _setting(
        480.0,
        "seconds without progress after which a rank writes its stacks and ends the run; 0: never",
        at_least=0,
        changes=NOTHING,
    )


@dataclass
class CheckpointConfig:
    interval: int = _setting(
        100, "steps between checkpoints; 0: at a stop and at the end only", at_least=0, changes=NOTHING
    )
    keep: int = _setting(
        2, "newest checkpoints to keep, besides those that hold a file named `keep`", at_least=1, changes=NOTHING
    )


@dataclass
class MeshConfig:
    dp_replicate: int = _setting(1, "replicas of the sharded model, usually one a node", at_least=1, changes=NOTHING)
    dp_shard: int = _setting(-1, "ranks that share one replica; -1: all that are left", at_least=-1, changes=NOTHING)
    sparse_reduce_scatter: bool = _setting(
        True, "exchange only principal entries of the gradients inside a replica, too", changes=NOTHING
    )
    timeout_minutes: float = _setting(10.0, "a collective that takes longer ends the job", above=0, changes=NOTHING)

    def layout(self, world_size: int) -> tuple[int, int]:
        """``(dp_replicate, dp_shard)`` whose product is ``world_size``. Raises ``UserError`` if there is none."""
        shard = world_size // self.dp_replicate if self.dp_shard == -1 else self.dp_shard
        if self.dp_replicate * shard != world_size:
            wanted = self.dp_replicate * max(1, self.dp_shard)
            shards = "equal size" if self.dp_shard == -1 else f"{self.dp_shard} shards (mesh.dp_shard)"
            raise UserError(
                f"mesh: {world_size} ranks cannot be {self.dp_replicate} replicas (mesh.dp_replicate) of {shards}; "
                f"start {'a multiple of ' * (self.dp_shard == -1)}{wanted}"
            )
        return self.dp_replicate, shard


def _slurm(default: Any, help: str, **bounds: Any) -> Any:
    return _setting(default, help, changes=NOTHING, **bounds)


# what SLURM takes as a name, a list of nodes, a feature expression, a time: nothing else reaches its commands
NAME = r"[A-Za-z0-9_@+.,][A-Za-z0-9_@+.,-]*"
NODES = r"[A-Za-z0-9_.,\[\]][A-Za-z0-9_.,\[\]-]*"
FEATURES = r"[A-Za-z0-9_.,&|*()\[\]@:][A-Za-z0-9_.,&|*()\[\]@:-]*"
TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"
OPTION = r"--[a-z][a-z-]*(=[A-Za-z0-9_@%+.,:/=\[\]-]*)?"


@dataclass
class SlurmConfig:
    nodes: int = _slurm(1, "nodes of a job", at_least=1)
    gpus_per_node: int | None = _slurm(None, "GPUs to ask for on each node, and a rank for each", at_least=1)
    ranks_per_node: int | None = _slurm(None, "ranks on each node where that is not a rank for each GPU", at_least=1)
    cpus_per_task: int | None = _slurm(None, "CPUs to ask for on each node, for all its ranks", at_least=1)
    time: str | None = _slurm(None, "time limit, as SLURM takes it: `12:00:00`, `2-00:00:00`, or minutes", pattern=TIME)
    partition: str | None = _slurm(None, "partition", pattern=NAME)
    account: str | None = _slurm(None, "account", pattern=NAME)
    qos: str | None = _slurm(None, "quality of service", pattern=NAME)
    constraint: str | None = _slurm(None, "features that nodes must have", pattern=FEATURES)
    reservation: str | None = _slurm(None, "reservation", pattern=NAME)
    exclude: str | None = _slurm(None, "nodes to leave out", pattern=NODES)
    options: list[str] = _slurm([], "more options of sbatch, each as `--name=value`", pattern=OPTION)
    container: str | None = _slurm(None, "image to run in")
    container_runtime: str = _slurm("pyxis", "what runs the image", choices=("pyxis", "apptainer"))
    container_mounts: list[str] = _slurm(
        [], "folders that the container sees, besides the current one and the home folder"
    )
    signal_lead: int = _slurm(
        300, "seconds before the time limit at which the run is told to save and stop", at_least=10
    )
    gpu_memory: float | None = _slurm(
        None, "GiB of a GPU's memory: what cannot fit, by `liftdist plan`, is not submitted", above=0
    )
    max_restarts: int = _slurm(
        1, "times in a row, without a new checkpoint, that crashed ranks are started again", at_least=0
    )
    max_preemptions: int = _slurm(100, "times that a preempted job is requeued", at_least=0)
    max_time_limits: int = _slurm(100, "times that a job at its time limit is requeued", at_least=0)
    max_node_failures: int = _slurm(10, "times that a job is requeued because of a node", at_least=0)


@dataclass
class Config:
    run_dir: str = _setting(
        MISSING, "folder for everything this run writes; if it holds a run already, that run continues", changes=NOTHING
    )
    cache_dir: str = _setting(
        "~/.cache/liftdist", "tokenised data, selections and digests, shared by runs", changes=NOTHING
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def settings() -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting as ``(dotted key, dataclass field)``, in the order of the file."""
    for top in dataclasses.fields(Config):
        factory = top.default_factory
        if dataclasses.is_dataclass(factory):
            for leaf in dataclasses.fields(factory):
                yield f"{top.name}.{leaf.name}", leaf
        else:
            yield top.name, top


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of every setting in a config as nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_table() -> str:
    """The table of settings in README.md."""
    defaults = dict(leaves(dataclasses.asdict(Config())))
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for key, leaf in settings():
        default = defaults[key]
        if default == MISSING:
            shown = "required"
        elif default is None:
            shown = "unset"
        else:
            shown = f"`{yaml.safe_dump(default, default_flow_style=True).splitlines()[0]}`"
        choices = leaf.metadata["choices"]
        meaning = leaf.metadata["help"] + (f" ({', '.join(f'`{c}`' for c in choices)})" if choices else "")
        rows.append(f"| `{key}` | {shown} | {meaning} |")
    return "\n".join(rows)
