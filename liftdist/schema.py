"""Settings: their names, meanings, defaults and bounds, and how a change affects a run that continues.

:mod:`liftdist.config` reads them. Imports no torch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types
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

LEARN = ("all", "last")  # replies of a conversation
TURNS = ("auto", "whole", "split")  # samples of a conversation


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
class EvalSourceConfig:
    """An entry of ``data.eval_sources``: a set of held-out records."""

    path: str = setting(MISSING, "records, in a form as for `data.path`")
    name: str | None = setting(
        None,
        "its name in the metrics; made from `path` if unset: that of the file, folder or data set",
        changes=NOTHING,
    )
    revision: str | None = setting(None, "commit, tag or branch on the hub; its main branch if unset", changes=NOTHING)
    subset: str | None = setting(None, "configuration name of a data set")
    split: str | None = setting(None, "split of a data set; `data.split`, of held-out data `data.eval_split`, if unset")
    format: str | None = setting(None, "as `data.format`, which holds if unset", choices=("auto", *FORMATS))
    fields: dict[str, str] = setting(
        {}, "as `data.fields`, which hold if there are none", example="{instruction: query, output: answer}"
    )
    prompt_template: str | None = setting(None, "as `data.prompt_template`, which holds if unset")
    response_template: str | None = setting(None, "as `data.response_template`, which holds if unset")
    learn: str | None = setting(None, "as `data.learn`, which holds if unset", choices=LEARN)
    turns: str | None = setting(None, "as `data.turns`, which holds if unset", choices=TURNS)


@dataclass
class SourceConfig(EvalSourceConfig):
    """An entry of ``data.sources``."""

    weight: float | None = setting(
        None,
        "share of an epoch, relative to the weights of the other sources; an epoch has as many samples as all sources "
        "together",
        above=0,
    )
    samples: int | None = setting(None, "samples that an epoch takes of it; each once if unset", at_least=1)


@dataclass(frozen=True)
class DataSource:
    """Where records are and how they are read: the settings of a source, each that is unset taken from ``data``."""

    key: str  # the setting of its path
    name: str  # in metrics
    path: str
    revision: str | None
    subset: str | None
    split: str
    format: str
    fields: dict[str, str]
    prompt_template: str | None
    response_template: str | None
    learn: str
    turns: str
    weight: float | None = None
    samples: int | None = None

    @property
    def section(self) -> str:
        """The section with the settings of how records are read."""
        return self.key.rpartition(".")[0]

    def problems(self) -> Iterator[Problem]:
        if self.response_template is not None and self.prompt_template is None:
            yield "response_template", "needs {section}.prompt_template, too; it may be {{field}} alone"
        elif self.response_template is not None:  # templates name the fields of records themselves
            for name, is_given in (("format", self.format != "auto"), ("fields", bool(self.fields))):
                if is_given:
                    yield (
                        name,
                        "is not used with {section}.prompt_template and {section}.response_template; leave it out",
                    )


@dataclass
class DataConfig:
    path: str | None = setting(
        None,
        "training data: a file (JSON Lines, JSON, CSV, Parquet, Arrow), a pattern (`data/*.jsonl`), a folder, or the name of "
        "a data set on the hub; or give `data.sources`",
    )
    sources: list[SourceConfig] = setting([], "several sources of training data, in place of `data.path`")
    revision: str | None = setting(
        None, "commit, tag or branch of `data.path` on the hub; its main branch if unset", changes=NOTHING
    )
    eval_path: str | None = setting(
        None, "held-out data for the evaluation loss, in a form as for `data.path`", changes=NOTHING
    )
    eval_sources: list[EvalSourceConfig] = setting(
        [], "several sets of held-out data, in place of `data.eval_path`", changes=NOTHING
    )
    eval_share: float | None = setting(
        None,
        "fraction of the records of each source that is held out for the evaluation loss, in place of `data.eval_path`",
        above=0,
        at_most=0.5,
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
    learn: str = setting("all", "which replies of a conversation are learned", choices=LEARN)
    turns: str = setting(
        "auto",
        "samples of a conversation: `whole`, one, in which every reply is learned as it stands there; `split`, one for each "
        "reply, as it was when it was asked for; `auto`, `split` only where the template drops a part of an earlier reply",
        choices=TURNS,
    )
    chat_template: str | None = setting(
        None, "chat template in place of the tokenizer's: a file that ends in `.jinja`, or the text itself"
    )
    template_arguments: dict[str, Any] = setting(
        {},
        "arguments of the chat template, such as `data.template_arguments.enable_thinking=false`; those of a record win; `null` "
        "takes one back",
        example="{enable_thinking: false}",
    )
    max_length: int = setting(2048, "longest sequence, in tokens", at_least=2)
    overlong: str = setting(
        "truncate", "what to do with longer samples; their number is reported", choices=("truncate", "drop")
    )
    packing: bool = setting(
        False, "fill sequences up to `max_length` with several samples, which do not attend to each other"
    )

    @property
    def training_sources(self) -> list[DataSource]:
        """The sources to train on: those of ``data.sources``, or the one of ``data.path``."""
        if self.sources:
            return [
                self._resolved(f"data.sources.{number}.path", entry, self.split)
                for number, entry in enumerate(self.sources)
            ]
        only = SourceConfig(path=self.path or "", revision=self.revision, subset=self.subset)
        return [self._resolved("data.path", only, self.split)]

    @property
    def held_out_sources(self) -> list[DataSource]:
        """The sources to evaluate on, if any: those of ``data.eval_sources``, or the one of ``data.eval_path``."""
        entries = [(f"data.eval_sources.{number}.path", entry) for number, entry in enumerate(self.eval_sources)]
        if self.eval_path is not None:
            only = EvalSourceConfig(path=self.eval_path, revision=self.eval_revision, subset=self.eval_subset)
            entries = [("data.eval_path", only)]
        found, training = [], self.training_sources
        for key, entry in entries:
            one = self._resolved(key, entry, self.eval_split)
            of_repository = {s.revision for s in training if _repository(s.path) == _repository(one.path)}
            of_set = {s.subset for s in training if s.path == one.path}
            revision = one.revision or (of_repository.pop() if len(of_repository) == 1 else None)
            subset = one.subset or (of_set.pop() if len(of_set) == 1 else None)
            found.append(dataclasses.replace(one, revision=revision, subset=subset))
        return found

    @property
    def all_sources(self) -> list[DataSource]:
        return [*self.training_sources, *self.held_out_sources]

    def _resolved(self, key: str, given: EvalSourceConfig, split: str) -> DataSource:
        inherited = ("format", "fields", "prompt_template", "response_template", "learn", "turns")
        values = dataclasses.asdict(given) | {name: getattr(given, name) or getattr(self, name) for name in inherited}
        values |= {"name": given.name or _name(given.path), "split": given.split or split}
        return DataSource(key, **values)

    def problems(self) -> Iterator[Problem]:
        if (self.path is None) == (not self.sources):
            both = "is given, and data.sources, too; unset one of them: data.path= or data.sources=[]"
            yield "path", both if self.sources else "must be given, in the file or as data.path=VALUE; or data.sources"
            return
        held_out = {"eval_path": self.eval_path, "eval_sources": self.eval_sources, "eval_share": self.eval_share}
        given = [name for name, value in held_out.items() if value]
        if len(given) > 1:
            yield given[-1], f"cannot be given together with data.{given[0]}; leave one of them out"
        for name, of, is_used in (
            ("subset", "path", not self.sources),
            ("revision", "path", not self.sources),
            ("eval_subset", "eval_path", self.eval_path is not None),
            ("eval_revision", "eval_path", self.eval_path is not None),
        ):
            if getattr(self, name) is not None and not is_used:
                what = name.removeprefix("eval_")
                yield name, f"is the {what} of data.{of}, which is not set; a source in a list has its own {what}"
        yield from _problems_of_mixture(self.sources)
        for kind, sources in (("sources", self.training_sources), ("eval_sources", self.held_out_sources)):
            yield from _problems_of_names(kind, [*getattr(self, kind)], sources)
            for number, source in enumerate(sources):
                is_own = bool(getattr(self, kind)) and getattr(self, kind)[number].prompt_template is not None
                for name, problem in source.problems():
                    key = f"{source.section}.{name}".removeprefix("data.")
                    yield key, problem.format(section=source.section if is_own else "data")


def _problems_of_mixture(sources: Sequence[SourceConfig]) -> Iterator[Problem]:
    """What is wrong with the weights and numbers of samples."""
    weighted = [source.weight is not None for source in sources]
    if any(weighted):
        for number, source in enumerate(sources):
            if source.samples is not None:
                yield f"sources.{number}.samples", "is not used where sources have a weight; leave one of them out"
            elif source.weight is None:
                known = f"data.sources.{weighted.index(True)}"
                yield (
                    f"sources.{number}.weight",
                    f"must be given, as {known} has one: all sources have a weight, or none",
                )


def _problems_of_names(
    kind: str, entries: Sequence[EvalSourceConfig], sources: Sequence[DataSource]
) -> Iterator[Problem]:
    for number, entry in enumerate(entries):
        if entry.name is not None and not re.fullmatch(_SOURCE_NAME, entry.name):
            yield (
                f"{kind}.{number}.name",
                f"must consist of letters, digits and the characters . - _, got {entry.name!r}",
            )
    first: dict[str, int] = {}
    for number, source in enumerate(sources):
        if (known := first.setdefault(source.name, number)) != number:
            key = f"{kind}.{number}"
            problem = (
                f"{source.name} is also the name of data.{kind}.{known}; give one of them another: data.{key}.name=NAME"
            )
            yield f"{key}.name" if entries[number].name else f"{key}.path", problem


_SOURCE_NAME = r"[\w.-]+"


def _name(path: str) -> str:
    """The name of a source in metrics: that of its file, folder or data set, of a pattern what all its files have."""
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)(\.\w+)?$", "", path)
    parts = re.sub(r"\[.*?\]|[*?]", "", stem).split("/")
    names = [re.sub(r"[^\w.-]+", "_", part).strip("_.-") for part in parts]
    return next((name for name in reversed(names) if name), "data")


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
    """Every setting as ``(dotted key, dataclass field)``, in the order of the file; ``N`` stands for the index of an entry.

    What a change affects is ``NOTHING`` for all settings of a list that says so.
    """
    for leaf in dataclasses.fields(section):
        inner, dots = _section(section, leaf)
        if inner is None:
            yield f"{prefix}{leaf.name}", leaf
            continue
        for key, found in settings(inner, f"{prefix}{leaf.name}{dots}"):
            if leaf.metadata.get("changes") == NOTHING:
                found = copy.copy(found)
                found.metadata = types.MappingProxyType({**found.metadata, "changes": NOTHING})
            yield key, found


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
NAMED_VALUES, VALUE = "values by name", "value"  # of any type that JSON has


@functools.cache
def texts(root: type = Config) -> dict[str, str]:
    """The settings that hold texts, or values of any type, by their key as in :func:`settings`: one of the kinds above."""
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
        elif typing.get_origin(hint) is dict:
            yield f"{prefix}{leaf.name}", NAMED_VALUES


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
    """The key as in :func:`settings`: ``a.N.b`` for ``a.0.b``, and ``a`` for ``a.name``, an entry of texts or values by name."""
    key = re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)
    named = (name for name, kind in texts(root).items() if kind in (NAMED_TEXTS, NAMED_VALUES))
    return next((name for name in named if key.startswith(f"{name}.")), key)


def kind_of_text(key: str, root: type) -> str | None:
    """What :func:`texts` says of a setting; ``TEXT`` for an entry of texts by name, ``VALUE`` for one of values by name."""
    kind = texts(root).get(template(key, root))
    is_entry = template(key, root).count(".") < key.count(".")
    return {NAMED_TEXTS: TEXT, NAMED_VALUES: VALUE}.get(kind or "", kind) if is_entry else kind


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
