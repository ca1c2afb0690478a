"""Settings: their names, meanings, defaults and bounds, and how a change affects a run that continues.

:mod:`liftdist.config` reads them. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import yaml
from omegaconf import MISSING

from liftdist.errors import UserError
from liftdist.registry import BUDGETS, CRITERIA, FORMATS, LOSSES, METHODS
from liftdist.signals import STOP_SIGNALS

Problem = tuple[str, str]  # (key of a setting within its section, or "", what is wrong)

# what a changed setting affects in a run that continues, see runs/changes.py
NOTHING = "nothing"  # no effect on the losses, except for the order of summation
COURSE = "course"  # how training continues
STATE = "state"  # the meaning of the saved state


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    pattern: str | None = None,
    example: str | None = None,
    changes: str = COURSE,
) -> Any:
    """A setting of a section: its default, meaning in one line, and bounds.

    Args:
        pattern: regular expression that the whole text must match.
        example: example of a list or of names and texts, for error messages.
        changes: what a change affects in a run that continues: ``NOTHING``, ``COURSE`` or ``STATE``.
    """
    metadata = dict(help=help, choices=choices, at_least=at_least, at_most=at_most, above=above, below=below)
    metadata |= dict(pattern=pattern, example=example, changes=changes)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    attn_implementation: str | None = setting(
        None, "attention implementation, as transformers names it; its default if unset", changes=NOTHING
    )
    activation_checkpointing: bool = setting(
        False, "recompute each decoder layer in backward instead of keeping its activations", changes=NOTHING
    )
    compile: bool = setting(False, "`torch.compile` each decoder layer", changes=NOTHING)
    trust_remote_code: bool = setting(False, "run model code that comes with the weights", changes=NOTHING)


@dataclass
class DataConfig:
    path: str = setting(
        MISSING,
        "training data: a file (JSON Lines, JSON, CSV, Parquet, Arrow), a pattern (`data/*.jsonl`), a folder, or the name of "
        "a data set on the hub",
    )
    revision: str | None = setting(
        None, "commit, tag or branch of `data.path` on the hub; its main branch if unset", changes=NOTHING
    )
    eval_path: str | None = setting(
        None, "held-out data for the evaluation loss, in a form as for `data.path`", changes=NOTHING
    )
    eval_revision: str | None = setting(
        None,
        "the same for `data.eval_path`; that of `data.path` if both are one repository",
        changes=NOTHING,
    )
    subset: str | None = setting(None, "configuration name of a data set")
    eval_subset: str | None = setting(
        None, "the same for `data.eval_path`; that of `data.path` if both are one data set", changes=NOTHING
    )
    split: str = setting("train", "split of a data set to train on, on the hub also a part of it: `train[:1000]`")
    eval_split: str = setting("test", "split of a data set to evaluate on", changes=NOTHING)
    format: str = setting(
        "auto",
        "which fields a record has, and how they are put together; `auto` detects it from the fields of the first record",
        choices=("auto", *FORMATS),
    )
    fields: dict[str, str] = setting(
        {},
        "names of the format's fields in your records, where they are others: `data.fields.instruction=query`",
        example="{instruction: query, output: answer}",
    )
    prompt_template: str | None = setting(
        None,
        "your own wording of the prompt, with `{query}` for the text of the record's field `query`, and `{{` and `}}` for braces",
    )
    response_template: str | None = setting(
        None, "the same for the response, which is learned; the format's response field, as it is, if unset"
    )
    learn: str = setting("all", "which replies of a conversation are learned", choices=("all", "last"))
    turns: str = setting(
        "auto",
        "samples of a conversation: `whole`, one, in which every reply is learned as it stands there; `split`, one for each "
        "reply, as it was when it was asked for; `auto`, `split` only where the template drops a part of an earlier reply",
        choices=("auto", "whole", "split"),
    )
    chat_template: str | None = setting(
        None, "chat template in place of the tokenizer's: a file that ends in `.jinja`, or the text itself"
    )
    max_length: int = setting(2048, "longest sequence, in tokens", at_least=2)
    overlong: str = setting(
        "truncate", "what to do with longer samples; their number is reported", choices=("truncate", "drop")
    )
    packing: bool = setting(
        False, "fill sequences up to `max_length` with several samples, which do not attend to each other"
    )

    @property
    def revision_of_eval_path(self) -> str | None:
        same = self.eval_path is not None and _repository(self.eval_path) == _repository(self.path)
        return self.eval_revision or (self.revision if same else None)

    @property
    def subset_of_eval_path(self) -> str | None:
        return self.eval_subset or (self.subset if self.eval_path == self.path else None)

    def problems(self) -> Iterator[Problem]:
        if self.eval_subset is not None and self.eval_path is None:
            yield "eval_subset", "is the subset of data.eval_path, which is not set"
        if self.eval_revision is not None and self.eval_path is None:
            yield "eval_revision", "is the revision of data.eval_path, which is not set"
        if self.response_template is not None and self.prompt_template is None:
            yield "response_template", "needs data.prompt_template, too; it may be {field} alone"
        elif self.response_template is not None:  # templates name the fields of records themselves
            for name, is_given in (("format", self.format != "auto"), ("fields", bool(self.fields))):
                if is_given:
                    yield name, "is not used with data.prompt_template and data.response_template; leave it out"


def _repository(path: str) -> str:
    """The name on the hub without that of a file (``hf://datasets/OWNER/NAME/FILE``); another path as it is."""
    return "/".join(path.split("/")[3:5]) if path.startswith("hf://") else path


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
    modules: list[str] = setting(
        ["*"], "patterns (`*`, `?`, `[]`) of the linear modules to train", example='["*.mlp.*"]', changes=STATE
    )

    def problems(self) -> Iterator[Problem]:
        if (self.density is None) == (self.budget_rank is None):
            given = "neither" if self.density is None else "both"
            key = "density" if given == "both" else ""
            yield key, f"set exactly one of selection.density and selection.budget_rank, got {given}"
        if not self.modules:
            yield "modules", "must name at least one pattern"


@dataclass
class OptimizerConfig:
    lr: float = setting(2e-4, "peak learning rate", above=0)
    betas: list[float] = setting(
        [0.9, 0.95], "decay rates of Adam's two moments", at_least=0, below=1, example="[0.9, 0.95]"
    )
    eps: float = setting(1e-6, "Adam's epsilon", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of the principal weights", at_least=0)
    dtype: str = setting(
        "float32",
        "dtype of the trained values and of Adam's moments; `bfloat16` keeps no more of them than the model's weights do, and "
        "loses updates that these would round away",
        choices=("float32", "bfloat16"),
        changes=STATE,
    )
    max_grad_norm: float | None = setting(None, "clip the principal gradient to this global norm", above=0)
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


@dataclass
class TrainConfig:
    loss: str = setting("cross_entropy", "loss of the labelled tokens", choices=tuple(LOSSES))
    loss_reduction: str = setting(
        "token",
        "mean over all labelled tokens of a step's batch, or over its samples of each sample's own mean",
        choices=("token", "sequence"),
    )
    epochs: int = setting(1, "passes over the data", at_least=1)
    steps: int | None = setting(None, "optimizer steps; overrides `epochs`", at_least=1)
    batch_size: int = setting(16, "sequences per optimizer step, over all ranks", at_least=1)
    micro_batch_size: int = setting(4, "sequences per forward and backward of a rank", at_least=1, changes=NOTHING)
    seed: int = setting(0, "seeds the order of the samples", at_least=0, at_most=2**32 - 1)
    eval_interval: int = setting(
        0, "steps between evaluations; 0: only before and after training", at_least=0, changes=NOTHING
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


@dataclass
class CheckpointConfig:
    interval: int = setting(
        100, "steps between checkpoints; 0: only at a stop and at the end", at_least=0, changes=NOTHING
    )
    keep: int = setting(
        2, "newest checkpoints to keep, besides those that hold a file named `keep`", at_least=1, changes=NOTHING
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


def _slurm(default: Any, help: str, **bounds: Any) -> Any:
    return setting(default, help, changes=NOTHING, **bounds)


# names, lists of nodes, times and options as SLURM accepts them: no other text is passed to its commands
NAME = r"[A-Za-z0-9_@+.,][A-Za-z0-9_@+.,-]*"
GROUP = r"[A-Za-z0-9_@+.,/:=%][A-Za-z0-9_@+.,/:=%-]*"  # partitions, accounts: sites name them as they like
NODES = r"[A-Za-z0-9_.,/\[\]][A-Za-z0-9_.,/\[\]-]*"  # with a slash, a file of them
TIME = r"\d+|\d+(:\d{1,2}){1,2}|\d+-\d+(:\d{1,2}){0,2}|(?i:unlimited|infinite)"
# in one line; --wrap, also cut short, would take the place of the script
OPTION = r"--(?!wr(a|ap)?(=|$))[a-z][a-z0-9-]*(=[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]*)?"


@dataclass
class SlurmConfig:
    nodes: int = _slurm(1, "nodes of a job", at_least=1)
    gpus_per_node: int | None = _slurm(None, "GPUs to request per node, with one rank each", at_least=1)
    ranks_per_node: int | None = _slurm(None, "ranks per node, if not one per GPU", at_least=1)
    cpus_per_task: int | None = _slurm(None, "CPUs to request per node, for all its ranks", at_least=1)
    time: str | None = _slurm(None, "time limit in SLURM's format: `12:00:00`, `2-00:00:00`, or minutes", pattern=TIME)
    partition: str | None = _slurm(None, "partition", pattern=GROUP)
    account: str | None = _slurm(None, "account", pattern=GROUP)
    qos: str | None = _slurm(None, "quality of service", pattern=GROUP)
    exclude: str | None = _slurm(None, "nodes to exclude", pattern=NODES)
    options: list[str] = _slurm(
        [], "further options for sbatch, each as `--name=value`", pattern=OPTION, example='["--mail-type=END"]'
    )
    container: str | None = _slurm(None, "container image to run in")
    container_runtime: str = _slurm("pyxis", "runtime of the container", choices=("pyxis", "apptainer"))
    container_mounts: list[str] = _slurm(
        [], "folders to mount, besides the current one and the home folder", example="[/scratch]"
    )
    signal_lead: int = _slurm(
        300, "seconds before the time limit at which the run is told to save and stop", at_least=10
    )
    gpu_memory: float | None = _slurm(
        None, "memory of a GPU in GiB; a run that does not fit, by `liftdist plan`, is not submitted", above=0
    )
    max_restarts: int = _slurm(1, "consecutive restarts of crashed ranks without a new checkpoint", at_least=0)
    max_requeues: int = _slurm(100, "requeues of a job after a preemption, a time limit or a lost node", at_least=0)


@dataclass
class Config:
    run_dir: str = setting(
        MISSING, "folder for everything this run writes; if it holds a run already, that run continues", changes=NOTHING
    )
    cache_dir: str = setting(
        "~/.cache/liftdist", "folder for tokenised data, selections and digests, shared by runs", changes=NOTHING
    )
    method: str = setting("lift", "what is trained, and how", choices=tuple(METHODS), changes=STATE)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def problems(self) -> Iterator[Problem]:
        if self.optimizer.dtype == "bfloat16" and self.model.dtype == "float32":
            yield "optimizer.dtype", "must be float32 with model.dtype=float32, or set model.dtype=bfloat16"
        flash = "flash" in (self.model.attn_implementation or "")
        if self.data.packing and flash and self.train.micro_batch_size != 1:
            yield (
                "train.micro_batch_size",
                "must be 1 with data.packing and flash attention (raise data.max_length instead), "
                f"got {self.train.micro_batch_size}",
            )


# ---------------------------------------------------------------------------------------------------------------------
# The tree. A section may hold sections, and lists of sections, whose entries have the keys SECTION.LIST.0.SETTING, ...


def settings(section: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every setting as ``(dotted key, dataclass field)``, in the order of the file; ``N`` stands for the index of an entry."""
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is None:
            yield f"{prefix}{leaf.name}", leaf
        else:
            yield from settings(inner, f"{prefix}{leaf.name}{dots}")


SECTION, LIST = "section", "list of sections"


def sections(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted key, SECTION or LIST)`` of all sections, of lists of them, and of their entries."""
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is not None:
            key = f"{prefix}{leaf.name}"
            yield from [(key, SECTION)] if dots == "." else [(key, LIST), (f"{key}.N", SECTION)]
            yield from sections(inner, f"{key}{dots}")


TEXT, OPTIONAL_TEXT, TEXTS, NAMED_TEXTS = "text", "text or unset", "list of texts", "texts by name"


@functools.cache
def texts(root: type = Config) -> dict[str, str]:
    """The settings that hold texts, by their key as in :func:`settings`: one of the four kinds above."""
    return dict(_texts(root, ""))


def _texts(section: type, prefix: str) -> Iterator[tuple[str, str]]:
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        hint = _hints(section)[leaf.name]
        if inner is not None:
            yield from _texts(inner, f"{prefix}{leaf.name}{dots}")
        elif hint is str or hint == str | None:
            yield f"{prefix}{leaf.name}", TEXT if hint is str else OPTIONAL_TEXT
        elif typing.get_origin(hint) is list and typing.get_args(hint) == (str,):
            yield f"{prefix}{leaf.name}", TEXTS
        elif typing.get_origin(hint) is dict and typing.get_args(hint) == (str, str):
            yield f"{prefix}{leaf.name}", NAMED_TEXTS


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _section(section: type, leaf: dataclasses.Field) -> tuple[type | None, str]:
    """The section that a field holds, or None, and the separator between its key and those of the section."""
    hint = _hints(section)[leaf.name]
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), "."
    entry = next(iter(typing.get_args(hint)), None)
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(entry):
        return typing.cast(type, entry), ".N."
    return None, ""


def template(key: str, root: type = Config) -> str:
    """The key as in :func:`settings`: ``a.N.b`` for ``a.0.b``, and ``a`` for ``a.name``, an entry of texts by name."""
    key = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)
    named = (name for name, kind in texts(root).items() if kind == NAMED_TEXTS)
    return next((name for name in named if key.startswith(f"{name}.")), key)


def kind_of_text(key: str, root: type) -> str | None:
    """What :func:`texts` says of a setting; ``TEXT`` for an entry of texts by name."""
    kind = texts(root).get(template(key, root))
    is_entry = template(key, root).count(".") < key.count(".")
    return TEXT if kind == NAMED_TEXTS and is_entry else kind


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """``(dotted key, field, value)`` of every setting of a config."""
    for leaf in dataclasses.fields(section):
        key, value = f"{prefix}{leaf.name}", getattr(section, leaf.name)
        inner, dots = _section(type(section), leaf)
        if inner is None:
            yield key, leaf, value
        elif dots == ".":
            yield from walk(value, f"{key}.")
        else:
            for number, entry in enumerate(value):
                yield from walk(entry, f"{key}.{number}.")


def problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Inconsistent settings of a config: the results of each section's ``problems``, with full keys."""
    own = getattr(section, "problems", None)
    for key, problem in own() if own is not None else ():
        yield (f"{prefix}.{key}" if key else prefix).lstrip("."), problem
    for leaf in dataclasses.fields(section):
        inner, dots = _section(type(section), leaf)
        value, key = getattr(section, leaf.name), f"{prefix}.{leaf.name}".lstrip(".")
        if inner is not None:
            entries = [(key, value)] if dots == "." else [(f"{key}.{i}", entry) for i, entry in enumerate(value)]
            for name, entry in entries:
                yield from problems(entry, name)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, value)`` of every setting in a config as nested mappings and lists."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                yield from leaves(entry, f"{prefix}{key}.{number}.")
        else:
            yield f"{prefix}{key}", value


def reference(section: type = Config) -> Iterator[tuple[str, str, str]]:
    """``(key, default, meaning)`` of every setting, as text with code in backticks."""
    for key, leaf in settings(section):
        default = leaf.default_factory() if callable(leaf.default_factory) else leaf.default
        if default == MISSING:
            shown = "required"
        elif default is None:
            shown = "unset"
        else:
            shown = f"`{yaml.safe_dump(default, default_flow_style=True).splitlines()[0]}`"
        choices = leaf.metadata["choices"]
        yield key, shown, leaf.metadata["help"] + (f" ({', '.join(f'`{c}`' for c in choices)})" if choices else "")
