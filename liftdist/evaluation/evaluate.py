"""Asks tasks outside of training, those of ``eval.tasks`` or of the lm-evaluation-harness: of a run at its newest checkpoint, or
of a model as it is. The harness gets a model folder, of a run one that is exported for it and removed afterwards; a server holds
the run's own export."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from liftdist import files
from liftdist.deltas import of_run
from liftdist.deltas.delta import Change, Delta
from liftdist.deltas.formats import as_trained, hf
from liftdist.distributed import collectives
from liftdist.distributed.collectives import together
from liftdist.errors import UserError
from liftdist.evaluation import server, tasks
from liftdist.evaluation.server import Server
from liftdist.models import weights
from liftdist.models.hub import resolve_model
from liftdist.options import Harness
from liftdist.registry import TRACKERS
from liftdist.runs import changes, checkpoint, claims, results
from liftdist.runs.checkpoint import Step
from liftdist.runs.context import RunContext
from liftdist.training import setup
from liftdist.training.inputs import agree_on_commits


def evaluate(context: RunContext, text: str, asked: Harness | None = None) -> None:
    """Ask, and write answers and figures to the run directory, as a run does at that step. Collective.

    Args:
        text: YAML text of the config, from :func:`liftdist.config.load`.
        asked: of the lm-evaluation-harness, in place of ``eval.tasks``.

    Raises:
        UserError: no tasks, tasks that cannot be asked, no intact checkpoint, or one of another base model, or one trained with
            settings that these contradict; or the run directory holds answers of another; or ``eval.server`` cannot be asked, or
            holds another model.
    """
    config, mesh, console = context.config, context.mesh, context.console
    if asked is None and not config.eval.tasks:
        raise UserError("eval.tasks: say what the model is to be asked, such as eval.tasks=[gsm8k]")
    held = _connected(context, asked)
    agree_on_commits(config, mesh, training=False)
    with together():
        folder = resolve_model(config.model.path, config.model.revision)
    with together():
        if asked is None:
            tasks.prepare(context) if held is None else tasks.prepare(context, held.room)
        else:
            try:
                from liftdist.evaluation import harness
            except ImportError as error:
                raise UserError(f"--harness: {error}; pip install 'liftdist[harness]'") from None

            loaded = harness.load(asked)
    base_digest = weights.digest(folder, Path(config.cache_dir), context.cancellation.beat)
    saved = _newest(context)
    with together():
        if saved is not None and saved.manifest.provenance.base != base_digest:
            raise UserError(f"{saved.folder}: is of another base model than model.path={config.model.path}")
        if saved is not None:
            changes.check_asked(saved.manifest.provenance, config, text, saved.folder)
    step = 0 if saved is None else saved.manifest.step
    run_dir = Path(config.run_dir).expanduser()
    with together():
        if mesh.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            results.check_base(run_dir, config.model.identity(base_digest))
    asking = f"asking {config.model.path}" if saved is None else f"asking {saved.folder}"
    if asked is not None:
        as_it_is = saved is None and config.model.base_dtype is None
        with contextlib.nullcontext(folder) if as_it_is else _exported(context, saved, folder, base_digest) as exported:
            console.say(asking)
            figures = harness.run(context, asked, loaded, exported, step)
    elif held is not None:
        served = folder if saved is None else _export_of(saved, run_dir)
        if note := held.check(config.model.path if saved is None else str(served), served, Path(config.cache_dir)):
            console.say(note)
        console.say(f"asking {held.url} for {held.model}")
        figures = tasks.run_on(context, held, step)
    else:
        model, _, method = setup.model_and_method(context, folder, base_digest, from_checkpoint=True)
        if saved is not None:
            with together():
                tensors = saved.read(method.matrices)
            method.load_state_dict(tensors, saved.manifest.snapshot.state["optimizer"])
        console.say(asking)
        figures = tasks.run(context, None, model, method, step)
    for name, value in figures.items():
        if not name.endswith(("/low", "/high")):
            bounds = [figures[f"{name}/{end}"] for end in ("low", "high") if f"{name}/{end}" in figures]
            interval = f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
            console.say(f"{name.removeprefix('eval/')}  {value:.4f}{interval}")
    console.say(f"answers in {run_dir / 'eval'}")
    with together():
        if mesh.is_main and "tensorboard" in config.metrics.trackers:
            tracker = TRACKERS.load("tensorboard").start(run_dir, None)
            tracker.scalars(step, figures)
            tracker.close()


def _connected(context: RunContext, asked: Harness | None) -> Server | None:
    """What ``eval.server`` holds, if it is set. Raises ``UserError`` as :func:`liftdist.evaluation.server.connect`."""
    config, ranks = context.config.eval, context.mesh.world_size
    if config.server is None:
        return None
    if asked is not None:
        raise UserError(
            "--harness: asks a model folder itself; leave out eval.server, or ask the server by the harness's own command"
        )
    if ranks > 1:
        raise UserError(f"eval.server: is asked by one rank, not by {ranks}; leave out --nproc and --nnodes")
    return server.connect(config)


def _export_of(saved: Step, run_dir: Path) -> Path:
    """The folder of a run's export of its newest checkpoint. Raises ``UserError`` if there is none."""
    target, step = run_dir / "export", saved.manifest.step
    if claims.exported(target) != step:
        raise UserError(
            f"{target}: is not the model of step {step}, the newest; export that (liftdist export {run_dir} --output FOLDER), "
            f"serve it, and ask it as a model of its own, with model.path=FOLDER and another run_dir"
        )
    return target


@contextlib.contextmanager
def _exported(context: RunContext, saved: Step | None, base: Path, base_digest: str) -> Iterator[Path]:
    """The model of a checkpoint, or the base model as it is rounded, as a folder in the run directory while the block lasts.
    Collective."""
    config = context.config.model
    name = files.name_beside(Path(context.config.run_dir).expanduser() / "export")
    target: Path = collectives.gather(name)[0]
    try:
        with together():
            nothing: dict[str, Change] = {}
            trained = Delta(base, base_digest, [], nothing.__getitem__) if saved is None else of_run.of_run(saved, base)
        if config.base_dtype is not None:
            as_rounded = {"base_dtype": config.base_dtype, "dtype": config.dtype} | dict(trained.made)
            as_trained.write(replace(trained, made=as_rounded, trusted=config.trust_remote_code), base, target)
        else:
            hf.write(trained, base, target, getattr(torch, config.dtype))
        yield target
    finally:
        if context.mesh.is_main:
            shutil.rmtree(target, ignore_errors=True)


def _newest(context: RunContext) -> Step | None:
    """The newest checkpoint of the run, None if it has not begun. Collective."""
    run_dir, shards = Path(context.config.run_dir).expanduser(), context.mesh.device_mesh.size(1)
    accepts: dict[str, str] = {}
    with together():
        if context.mesh.is_main:
            accepts = checkpoint.accepted(run_dir, claims.attempts(run_dir))
    say, beat, shard = context.console.say, context.cancellation.beat, context.mesh.rank % shards
    return checkpoint.newest(run_dir, accepts, shard, shards, say, set_aside=False, beat=beat)
