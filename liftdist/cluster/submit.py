"""``liftdist submit``, ``status`` and ``logs``: runs as jobs of a SLURM cluster.

    config and data checked -> sbatch --test-only -> sbatch -> a line in RUN_DIR/jobs.jsonl, by which the others find the job

Imports torch late: to plan, where ``slurm.gpu_memory`` is set, and to encode the first records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from liftdist import config as configs
from liftdist import environment, files, output, preflight, schema_tree, start
from liftdist.cluster import commands, history, job, scheduler
from liftdist.cluster.scheduler import Job
from liftdist.errors import UserError
from liftdist.options import allowed_by, split_arguments
from liftdist.runs import changes, layout
from liftdist.schema import Config

#: options that stand for a setting of the section ``slurm``
SETTINGS = (
    "nodes", "gpus_per_node", "ranks_per_node", "cpus_per_task", "time", "partition", "account", "qos", "exclude",
    "container",
)  # fmt: skip
_POLL = 2.0  # seconds between two looks at a job that is followed
_BRIEFLY = 10.0  # seconds for an answer of SLURM's that can be done without


# ---------------------------------------------------------------------------------------------------------------------
# Submit.


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``liftdist submit``."""
    helps = {key.removeprefix("slurm."): leaf.metadata["help"] for key, leaf in schema_tree.settings(Config)}
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", help=helps[name].replace("%", "%%"))
    parser.add_argument("--job-name", help="name of the job (default: that of the run directory)")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=a,b,c", help="an array over these values")
    parser.add_argument("--array", help="indices of a job array, each with a run directory of its own")
    parser.add_argument("--dependency", help="jobs to wait for, as sbatch takes them")
    parser.add_argument("--dry-run", action="store_true", help="show the command and submit nothing")


def submit(options: argparse.Namespace) -> None:
    """Check, then submit.

    Raises:
        UserError: whatever ``liftdist train`` would refuse, and what SLURM refuses.
    """
    overrides = list(options.overrides)
    for name in SETTINGS:
        if (value := getattr(options, name)) is not None:
            _check_word(f"--{name.replace('_', '-')}", value)
            overrides.append(f"slurm.{name}={value}")
    for name in ("job_name", "array", "dependency"):
        _check_word(f"--{name.replace('_', '-')}", getattr(options, name))
    points = job.sweep(options.sweep)
    array = options.array or (f"0-{len(points) - 1}" if options.sweep else None)
    indices = _indices(array) if array else [None]
    with _as_task(indices[0]):
        config, _ = configs.load(options.config, overrides)
    base = Path(config.run_dir).expanduser()
    _check_folder(base, array is not None)
    _check_time(config)
    sweeps = (word for sweep in options.sweep for word in ("--sweep", sweep))
    script_words = [*sweeps, *options.flags, options.config, *overrides]
    runs = {}
    for index in indices:
        with _as_task(index):
            runs[index] = _check(config, script_words, index, options.dry_run)
    name = options.job_name or re.sub(r"[^A-Za-z0-9_.-]", "_", base.name).lstrip("-.")[:64] or "liftdist"
    logs = base / layout.LOGS
    variables = _variables(config)
    command = scheduler.sbatch(config, script_words, name, logs, array, options.dependency)
    shown = {one.name: variables[one.name] for one in (environment.PYTHON, environment.LEAD) if one.name in variables}
    if options.dry_run:
        print(shlex.join(["env", *(f"{key}={value}" for key, value in shown.items()), *command]))
        return
    scheduler.test_only(command, variables)
    base.mkdir(parents=True, exist_ok=True)
    files.real_folder(logs)  # SLURM does not create it, and a job without it fails silently
    # the job's own, whatever becomes of the file
    mark = f"{job.SUBMITTED}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"  # by which SLURM is asked for the job
    kept = logs.absolute() / f"{mark}.yaml"
    files.write(kept, Path(options.config).read_text())
    script_words[script_words.index(options.config)] = str(kept)
    command = scheduler.sbatch(config, script_words, name, logs, array, options.dependency)
    id = commands.submit(command, variables, mark)
    history.note(base, "submit", job=id, array=array, log=str(logs.absolute()))
    for index, run_dir in runs.items():
        if index is not None:
            history.note(run_dir, "submit", job=f"{id}_{index}", log=str(logs.absolute()))
        print(f"job {id}{'' if index is None else f'_{index}'}  run directory {run_dir}")
    print(
        f"liftdist status {shlex.quote(str(base))} shows how it goes; liftdist logs -f, liftdist cancel",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _as_task(index: int | None) -> Iterator[None]:
    """With the variable set by which a config may refer to the index of a task."""
    name = environment.SLURM_ARRAY_TASK_ID.name
    before = os.environ.pop(name, None)
    if index is not None:
        os.environ[name] = str(index)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _check_word(option: str, value: Any) -> None:
    if value is not None and (not value or not isinstance(value, str)):  # argparse makes a list of `--option=--`
        raise UserError(f"{option}: must have a value")


def _check_folder(folder: Path, array: bool) -> None:
    """Raises ``UserError``: a run directory that is to hold those of an array, or the other way round."""
    for event in history.read(folder):
        if event["event"] == "submit" and bool(event.get("array")) != array:
            raise UserError(f"run_dir {folder}: holds {'a run' if array else 'the runs of an array'}; give another")


def _check_time(config: Config) -> None:
    """Raises ``UserError``: a job that would be asked to stop as soon as it starts."""
    slurm = config.slurm
    limit = scheduler.seconds(slurm.time) if slurm.time else None
    if limit and limit <= slurm.signal_lead:  # 0: no limit
        raise UserError(
            f"slurm.time={slurm.time}: the last slurm.signal_lead={slurm.signal_lead} seconds of it are for saving, "
            "nothing is left for training"
        )


def _check(base: Config, words: Sequence[str], index: int | None, dry_run: bool) -> Path:
    """What ``liftdist train`` would check for one run; its run directory."""
    resolved = job.of_task(words, index)
    given, flags = split_arguments(resolved)
    config, text = configs.load(given[0], given[1:])
    run_dir = Path(config.run_dir).expanduser()
    changes.check_settings(config, text, allowed_by(flags))
    ranks = base.slurm.ranks_per_node or base.slurm.gpus_per_node or 1
    config.mesh.layout(base.slurm.nodes * ranks)
    if base.slurm.gpu_memory is not None:
        from liftdist.planning import plan  # imports torch

        plan.check_fits(config, base.slurm.nodes, ranks)
    if not dry_run:
        preflight.check(config, base.slurm.nodes * ranks, training=True)
        preflight.fetch(config, training=True)
        _check_first_records(config)
        waiting = [known for known in scheduler.jobs(history.job_ids(run_dir)) if not known.has_ended]
        if waiting:
            raise UserError(
                f"run_dir {run_dir}: job {waiting[0].id} works on it ({waiting[0].state}); liftdist cancel ends it"
            )
    return run_dir


_checked: list[tuple[Any, Any]] = []  # model and data of the points of a sweep


def _check_first_records(config: Config) -> None:
    """Encode the first records, so that no job that has waited for hours ends by them."""
    from liftdist.training import inputs  # imports torch

    if (config.model, config.data) not in _checked:
        inputs.check_first_records(config)
        _checked.append((config.model, config.data))


def _indices(array: str) -> list[int | None]:
    """The indices of ``0-7:2,9%2``. Raises ``UserError``."""
    if not re.fullmatch(scheduler.ARRAY, array, re.ASCII):
        raise UserError(f"--array {array!r}: is not of a form that SLURM takes")
    found: list[int | None] = []
    for part in array.partition("%")[0].split(","):
        bounds, _, stride = part.partition(":")
        first, _, last = bounds.partition("-")
        found += range(int(first), int(last or first) + 1, max(1, int(stride or 1)))
    if len(found) > 1000:
        raise UserError(f"--array {array}: more than 1000 tasks")
    return found


def _variables(config: Config) -> dict[str, str]:
    """The environment that a job starts with: this one, without what another job left in it."""
    kept = {key: value for key, value in os.environ.items() if not re.match(r"(SLURM|LIFTDIST)_", key)}
    kept |= {key: os.environ[key] for key in ("SLURM_CONF", "SLURM_CLUSTERS") if key in os.environ}
    if environment.PATIENCE.is_set():
        kept[environment.PATIENCE.name] = os.environ[environment.PATIENCE.name]
    kept[environment.LEAD.name] = str(config.slurm.signal_lead)
    kept[environment.COMMAND.name] = json.dumps(["liftdist", *sys.argv[1:]])
    if config.slurm.container is None:
        kept[environment.PYTHON.name] = sys.executable
        kept[environment.START.name] = start.__file__
    elif environment.CONTAINER_PYTHON.is_set():
        kept[environment.CONTAINER_PYTHON.name] = environment.CONTAINER_PYTHON.need()
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Follow.


def status(folder: Path) -> None:
    """Print how the jobs of a run are. Raises ``UserError``."""
    for run_dir in history.runs(folder):
        print("\n".join(_status(run_dir)))


def _status(run_dir: Path) -> Iterator[str]:
    yield f"run      {run_dir}"
    events = history.read(run_dir)
    known: list[Job] = []
    try:
        known = scheduler.jobs(history.job_ids(run_dir)[-5:], _BRIEFLY)
    except scheduler.Unknown as error:  # the rest is known without it
        known = error.jobs
        yield f"job      {error}"
    except UserError as error:  # there is no SLURM here
        yield f"job      {error}"
    for found in known:
        reason = f"  ({found.reason})" if found.reason not in ("", "None") and not found.has_ended else ""
        yield f"job      {found.id}  {found.state}{f'  {found.nodes}' if found.nodes else ''}{reason}"
    starts = [event for event in events if event["event"] == "start"]
    ends = {history.start_name(event): event for event in events if event["event"] == "end"}
    for event in starts:
        yield _start_line(event, ends.get(history.start_name(event)))
    figures = _figures(run_dir)
    if "train/loss" in figures:
        of = f" of {steps}" if (steps := _steps(run_dir)) else ""
        loss, speed = (_number(figures.get(tag)) for tag in ("train/loss", "throughput/tokens_per_second"))
        yield f"step     {figures['step']}{of}  loss {loss:.4f}  {speed:.0f} tokens/s"
    if step := history.committed_step(run_dir):
        yield f"saved    step {step}"
    ended = ends.get(history.start_name(starts[-1])) if starts else None
    if ended and ended["action"] == "fail" and ended["cause"] != history.ASKED:
        yield f"failure  {ended['message']}"


def _start_line(start: history.Event, ended: history.Event | None) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(start["time"]))
    line = f"start    {history.start_name(start)}  {when}  {', '.join(start['nodes'])}  from step {start['step']}"
    if ended is None:
        return line
    then = {"requeue": "; requeued", "restart": "; restarted", "fail": "; given up"}.get(ended["action"], "")
    then = "" if ended["cause"] == history.ASKED else then
    without = f" without {', '.join(ended['exclude'])}" if ended.get("exclude") else ""
    message = ended["message"].partition("\n")[0]
    return f"{line}: {message}{then}{without}"


def _figures(run_dir: Path) -> dict[str, Any]:
    """The newest line of the metrics that has a loss."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError), files.open_to_read(run_dir / layout.METRICS) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                figures = json.loads(line)
                if isinstance(figures, dict) and "train/loss" in figures and "step" in figures:
                    found = figures
    return found


def _number(figure: Any) -> float:
    return figure if isinstance(figure, int | float) else math.nan


def _steps(run_dir: Path) -> int | None:
    """The number of steps of a run, if its config sets it."""
    try:
        steps = yaml.safe_load(files.read(run_dir / "config.yaml"))["train"]["steps"]
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return None
    return steps if isinstance(steps, int) else None


def _log(run_dir: Path) -> tuple[str, Path] | None:
    """The newest job of a run, and the file of its output."""
    for event in reversed(history.read(run_dir)):
        if event["event"] == "start" and event.get("log"):
            return event["job"], Path(event["log"])
        if event["event"] == "submit" and not event.get("array"):
            return event["job"], Path(event["log"]) / f"slurm-{event['job']}.out"
    return None


def logs(folder: Path, follow: bool, rank: int | None) -> None:
    """Print the newest job's output, or that of one of its ranks, and go on while it runs. Raises ``UserError``."""
    runs = history.runs(folder)
    if len(runs) > 1:
        raise UserError(f"{folder}: holds {len(runs)} runs; give one of them, as {runs[0]}")
    found = _log(runs[0])
    if found is None:
        raise UserError(f"{folder}: no job has started")
    id, path = found
    if rank is not None:
        files.check_real_folder(runs[0] / layout.LOGS)
        written = (runs[0] / layout.LOGS).glob(f"*/rank-{rank:05d}.log")
        starts = sorted((log for log in written if not log.parent.is_symlink()), key=lambda log: log.lstat().st_mtime)
        if not starts:
            raise UserError(f"{folder}: no output of rank {rank}; that of rank 0 is in the log of the job")
        path = starts[-1]
    with contextlib.suppress(KeyboardInterrupt):
        _follow(path, id if follow else None)


def _follow(path: Path, id: str | None) -> None:
    """Print ``path``, and what is added to it while job ``id`` runs, as far as SLURM tells. Raises ``UserError``."""
    files.check_real_folder(path.parent)
    at, found, silent = 0, False, False
    while True:
        try:
            ended = id is None or all(known.has_ended for known in scheduler.jobs([id], patience=0))
            if silent:
                print("liftdist: SLURM answers again", file=sys.stderr)
            silent = False
        except scheduler.Unknown as error:
            if not silent:
                print(f"liftdist: {error}; following the log all the same, Ctrl-C ends it", file=sys.stderr)
            ended, silent = False, True
        added = b""
        try:
            with files.open_to_read(path) as file:
                found = True
                at = min(at, file.seek(0, os.SEEK_END))
                file.seek(at)
                added = file.read()
                at += len(added)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(files.reason(error)) from None
        if added:
            sys.stdout.buffer.write(added)
            sys.stdout.flush()
            if output.reader_has_gone():  # as `| head` does
                return
        if ended:
            if not found:
                raise UserError(f"{path}: the job has written nothing yet")
            return
        time.sleep(_POLL)
