"""Settings: dataclasses with their meaning and bounds, a YAML file, ``key=value`` overrides, validation.

    defaults < YAML file < command line, merged by OmegaConf; whatever is wrong is one line that names where it stands.

Imports no torch: a misspelt key is reported in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

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


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """Read and validate a config.

    Returns:
        The resolved config, and its YAML text with ``${oc.env:...}`` left as written, which is safe to keep.

    Raises:
        UserError: unreadable file, unknown key, wrong type, value out of bounds.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {getattr(error, 'strerror', None) or error}") from None
    _REFERENCED.update(name for part in (text, *overrides) for name in _REFERENCE.findall(part))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: {'is empty' if root is None else 'must hold settings, one name: value a line'}")
        lines = dict(_key_lines(root))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}"
        ) from None
    for key, line in lines.items():
        _check_key(key, f"{path}:{line}")
    for key, value in root.value:
        if key.value in _SECTIONS and not isinstance(value, yaml.MappingNode):
            raise UserError(f"{path}:{lines[key.value]}: {key.value} must hold settings, one name: value a line")

    config = OmegaConf.structured(Config)
    origin = {key: f"{path}:{line}: {key}" for key, line in lines.items()}
    try:
        config.merge_with(OmegaConf.create(text))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{origin.get(key, f'{path}: {key}')}: {_explain(error, key)}") from None
    except yaml.MarkedYAMLError as error:  # what a loader minds and a parser does not: a key given twice
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem}") from None
    if (written := _time_as_written(root)) is not None:
        config.slurm.time = written
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected key=value")
        _check_key(key, f"override {override!r}")
        origin[key] = f"override {override!r}: {key}"
        try:
            config.merge_with_dotlist([f"{key}='{value}'" if re.fullmatch(_CLOCK, value) else override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{origin[key]}: {_explain(error, key)}") from None
    try:
        resolved = cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        problem = "must be given" if "MISSING" in type(error).__name__.upper() else _explain(error, key)
        raise UserError(f"{origin.get(key, f'{path}: {key}')}: {problem}") from None
    _validate(resolved, lambda key: origin.get(key, f"{path}: {key}"))
    return resolved, OmegaConf.to_yaml(_redacted(OmegaConf.to_container(config, resolve=False)))


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


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` without secrets: the value of an environment variable that is named like one, or that the config
    asked for by ``${oc.env:NAME}``, is replaced by ``<NAME>``."""
    environment = os.environ if environment is None else environment
    secrets = {n: v for n, v in environment.items() if len(v) >= 4 and (_SECRET_NAME.search(n) or n in _REFERENCED)}
    secrets = {n: v for n, v in secrets.items() if not _HARMLESS_NAME.fullmatch(n)}
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>")
    return text


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


_CLOCK = r"\d+:\d\d(:\d\d)?"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|HOSTNAME|SLURM_\w+")
_REFERENCE = re.compile(r"oc\.env:\s*(\w+)")
_REFERENCED: set[str] = set()  # names of the variables that the config asked for


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _time_as_written(root: yaml.MappingNode) -> str | None:
    """``slurm.time`` where YAML would read a number in base 60: 12:00:00 as 43200, which are minutes to SLURM."""
    sections = {key.value: value for key, value in root.value}
    section = sections.get("slurm")
    if isinstance(section, yaml.MappingNode):
        for key, value in section.value:
            if key.value == "time" and isinstance(value, yaml.ScalarNode) and re.fullmatch(_CLOCK, value.value):
                return str(value.value)
    return None


def _check_key(key: str, where: str) -> None:
    known = [name for name, _ in settings()]
    if key in known or key in _SECTIONS:
        return
    near = difflib.get_close_matches(key, [*known, *_SECTIONS], n=1, cutoff=0.5)
    if not near:  # the section may be what was left out or misspelt
        near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _explain(error: Exception, key: str) -> str:
    if key in _LISTS:
        return f"must be a list, in quotes for the shell: {key}='{_LISTS[key]}'"
    if key in _SECTIONS:
        return f"is a section; give one of its settings, {key}.NAME=VALUE"
    if isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {error.problem or error.context}"
    text = str(error).splitlines()[0]
    if "is not Optional" in text:
        return "must not be empty"
    variable = re.search(r"Environment variable '\w+' not found", text)
    return redact(variable[0] if variable else text)


_SECTIONS = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
_LISTS = {
    "selection.modules": '["*.mlp.*"]',
    "optimizer.betas": "[0.9, 0.95]",
    "train.stop_signals": "[SIGTERM, SIGUSR1]",
    "slurm.options": '["--mail-type=END"]',
    "slurm.container_mounts": "[/scratch]",
}


def _validate(config: Config, where: Any) -> None:
    values = dict(leaves(dataclasses.asdict(config)))
    for key, leaf in settings():
        value = values[key]
        for item in value if isinstance(value, list) else [value]:
            problem = _problem(item, leaf.metadata)
            if problem:
                raise UserError(redact(f"{where(key)}: {problem}, got {item!r}"))
    selection, mesh = config.selection, config.mesh
    if (selection.density is None) == (selection.budget_rank is None):
        given = "neither" if selection.density is None else "both"
        raise UserError(
            f"{where('selection.density' if given == 'both' else 'selection')}: "
            f"set exactly one of selection.density and selection.budget_rank, got {given}"
        )
    if len(config.optimizer.betas) != 2:
        raise UserError(f"{where('optimizer.betas')}: must be two numbers, got {config.optimizer.betas}")
    if not selection.modules:
        raise UserError(f"{where('selection.modules')}: must name at least one pattern")
    if mesh.dp_shard == 0:
        raise UserError(f"{where('mesh.dp_shard')}: must be -1 or at least 1, got 0")
    if (
        config.data.packing
        and "flash" in (config.model.attn_implementation or "")
        and config.train.micro_batch_size != 1
    ):
        raise UserError(
            f"{where('train.micro_batch_size')}: must be 1 with data.packing and flash attention (raise data.max_length "
            f"instead), got {config.train.micro_batch_size}"
        )


def _problem(value: Any, bounds: Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            return "must not be empty"
        if "\0" in value:
            return "must not hold a null character"
        if value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                return "names the home folder of nobody"
        if bounds["choices"] and value not in bounds["choices"]:
            near = difflib.get_close_matches(value, bounds["choices"], n=1)
            return f"must be one of {', '.join(bounds['choices'])}" + (f" (did you mean {near[0]}?)" if near else "")
        if bounds["pattern"] and not re.fullmatch(bounds["pattern"], value, re.ASCII):
            return "is not of a form that SLURM takes"
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    checks = (
        ("at_least", value.__ge__, "at least"),
        ("at_most", value.__le__, "at most"),
        ("above", value.__gt__, "above"),
        ("below", value.__lt__, "below"),
    )
    for name, holds, words in checks:
        if bounds[name] is not None and not holds(type(value)(bounds[name])):
            return f"must be {words} {bounds[name]}"
    return None
