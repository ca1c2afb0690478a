"""One run on all ranks.

claim the run directory -> inputs -> newest checkpoint, or none -> model and method -> steps -> export
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from liftdist import __version__, environment, preflight, schema_tree
from liftdist.console import Console
from liftdist.deltas import of_run
from liftdist.deltas.formats import hf
from liftdist.distributed import collectives
from liftdist.distributed.collectives import together
from liftdist.distributed.mesh import Mesh
from liftdist.errors import PeerError, Stopped, UserError
from liftdist.methods import named
from liftdist.models import weights
from liftdist.redaction import redact
from liftdist.registry import EVALUATIONS
from liftdist.runs import changes, checkpoint, claims, layout, results
from liftdist.runs.checkpoint import Step
from liftdist.runs.claims import Attempt
from liftdist.runs.context import RunContext
from liftdist.runs.describe import describe_run
from liftdist.runs.layout import CHECKPOINTS
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.runs.saver import Checkpointer
from liftdist.runs.stop import CancellationPoint, StopRequests
from liftdist.runs.watchdog import Watchdog
from liftdist.schema import Config
from liftdist.training import setup
from liftdist.training.inputs import Inputs, agree_on_commits, commits, hash_files, prepare_inputs
from liftdist.training.loop import Loop
from liftdist.training.publish import Publisher
from liftdist.training.recorder import Recorder
from liftdist.training.trainer import Trainer


def train(config: Config, mesh: Mesh, text: str, allowed: set[str], stop: StopRequests) -> None:
    """Train ``config`` to its last step, from its newest checkpoint if it has one. Collective.

    Args:
        text: YAML text of the config, as written to the run directory.
        allowed: kinds of changes that are allowed when a run continues, see :mod:`liftdist.runs.changes`.
        stop: the stop requests of this rank.

    Raises:
        Stopped: on a stop request, after saving.
    """
    console = Console(mesh.is_main)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    run_dir = Path(config.run_dir).expanduser()
    claimed: Attempt | None = None
    with together():
        preflight.check_cache_dir(config)
        preflight.check_own_answers(config)
    with together():
        if mesh.is_main:
            claimed = claims.claim(run_dir, lambda history: checkpoint.accepted(run_dir, history))
            stop.watch(run_dir)
    attempt: Attempt = collectives.gather(claimed)[0]
    stacks = run_dir / f"hang-{attempt.number}"
    watchdog = Watchdog(config.train.hang_timeout, stacks, mesh.rank, mesh.world_size)
    context = RunContext(config, mesh, console, CancellationPoint(stop, watchdog))
    outcome: dict[str, Any] = {"outcome": "failed"}
    try:
        with attempt.heartbeat() if mesh.is_main else contextlib.nullcontext():
            with watchdog.watching():
                trainer = _run(context, text, allowed, attempt)
            if config.train.export:
                _export(trainer, attempt, console, trainer.step, "export")
                if (best := trainer.best.step) not in (None, trainer.step):
                    assert best is not None
                    _export(trainer, attempt, console, best, "export-best")
        outcome = {"outcome": "finished"}
    except Stopped as reason:
        outcome = {"outcome": "stopped", "reason": str(reason)}
        if mesh.is_main:
            stop.done()
        raise
    except BaseException as error:
        outcome["reason"] = redact(f"{type(error).__name__}: {error}")
        raise
    finally:
        if mesh.is_main:
            attempt.note("end", **outcome)


def _run(context: RunContext, text: str, allowed: set[str], attempt: Attempt) -> Trainer:
    """Everything but the export."""
    config, mesh, console, cancellation = context.config, context.mesh, context.console, context.cancellation
    inputs = _inputs(context)
    with together():
        EVALUATIONS.load("tasks").prepare(context)
    shards = mesh.device_mesh.size(1)
    saved = checkpoint.newest(
        attempt.run_dir, attempt.accepts, mesh.rank % shards, shards, console.say, beat=cancellation.beat
    )
    base_digest = weights.digest(inputs.folder, Path(config.cache_dir), cancellation.beat)
    with together():
        contents = named.digests_of(config)
    samples = inputs.samples
    provenance = changes.provenance(config, text, base_digest, samples.digest, commits(config), contents, len(samples))
    state_changed = _check_changes(context, provenance, saved, allowed, attempt.run_dir)
    with together():
        if mesh.is_main and config.eval.tasks:
            results.check_base(attempt.run_dir, config.model.identity(base_digest))
    model, names, method = setup.model_and_method(
        context, inputs.folder, base_digest, from_checkpoint=saved is not None, inputs=inputs
    )
    model.train()
    trainer = Trainer(config, mesh, inputs, model, method, cancellation.beat)
    if saved is not None:
        _resume(context, trainer, saved, attempt, state_changed)
    checkpointer = Checkpointer(attempt, mesh, config.checkpoint.keep, saved)
    checkpointer.best = trainer.best.step
    changed = method.changes(names)
    trained = {name: stored for name, (stored, _) in changed.items()}
    copies = {stored: names.copies[stored] for stored in trained.values() if stored in names.copies}
    parts = {name: part for name, (_, part) in changed.items() if part is not None}

    def snapshot() -> Snapshot:
        return Snapshot(trainer.step, trainer.state(), provenance, trained, parts, copies)

    publisher = None
    if config.sync.to is not None:
        publisher = Publisher(config.sync, attempt.run_dir, inputs.folder, mesh, method, snapshot)
    recorder = _recorder(context, trainer, text, attempt, resumed=saved is not None)
    loop = Loop(context, trainer, recorder, checkpointer, snapshot, publisher)
    try:
        loop.to_the_end()
    except Stopped as reason:
        console.say(f"{reason}: saving step {trainer.step}")
        loop.save_last()
        raise
    except (UserError, PeerError):  # raised on all ranks, so that a running save can still be committed
        checkpointer.wait(cancellation.beat)
        raise
    finally:
        recorder.close()
        if publisher is not None:
            publisher.close()
    return trainer


def _inputs(context: RunContext) -> Inputs:
    """The tokenised data. Local rank 0 hashes the data files; the others read the digests from the cache. Collective."""
    config, mesh, console, cancellation = context.config, context.mesh, context.console, context.cancellation
    agree_on_commits(config, mesh)
    local_rank, local_ranks = environment.LOCAL_RANK.get(0), environment.LOCAL_WORLD_SIZE.get(1)
    shares = [(mesh.rank, mesh.world_size), (local_rank, local_ranks)]  # the second for caches of each machine's own

    if local_rank == 0:
        collectives.all_work(lambda check: hash_files(config, console, check), cancellation.check)
    else:
        collectives.all_work(lambda _: None, cancellation.check)
    return collectives.all_work(lambda check: prepare_inputs(config, console, shares, check), cancellation.check)


def _check_changes(
    context: RunContext, provenance: Provenance, saved: Step | None, allowed: set[str], run_dir: Path
) -> bool:
    """Compare the inputs of all ranks with rank 0's, and with the checkpoint's. Collective.

    Returns:
        Whether a change affects the meaning of the saved state.

    Raises:
        UserError: the ranks differ, or a change is not allowed.
    """
    first = collectives.gather(provenance)[0]
    with together():
        changes.check_alike(provenance, first, context.mesh.rank)
        changed = changes.between(saved.manifest.provenance, provenance) if saved else []
        changes.refuse(changed, allowed, run_dir)
    if changed:
        context.console.say("changed since the checkpoint: " + "; ".join(redact(line) for _, line in changed))
    return schema_tree.STATE in {kind for kind, _ in changed}


def _resume(context: RunContext, trainer: Trainer, saved: Step, attempt: Attempt, state_changed: bool) -> None:
    """Restore the trainer from a checkpoint. Collective."""
    with together():
        tensors = saved.read(trainer.method.matrices)
    trainer.restore(saved.manifest.snapshot.state, tensors)
    if state_changed:
        trainer.method.reselect(trainer.step)
    context.console.say(
        f"continuing after step {trainer.step} of {trainer.steps} ({saved.folder}, attempt {attempt.number}), "
        f"learning rate {trainer.schedule.get_last_lr()[0]:.3g}"
        if trainer.step < trainer.steps
        else f"nothing is left to train: step {trainer.step} of {trainer.steps} is done"
    )


def _recorder(context: RunContext, trainer: Trainer, text: str, attempt: Attempt, resumed: bool) -> Recorder:
    """Describe the run in the run directory and on the console, and open the recorder. Collective."""
    mesh, run_dir = context.mesh, attempt.run_dir
    with together():
        if mesh.is_main:  # not earlier: a command that fails before this point leaves no description
            describe_run(run_dir, text, mesh, commits(context.config))
        after = trainer.step if resumed else None if attempt.number == 1 else -1
        names = context.config.metrics.trackers if mesh.is_main else None
        if mesh.is_main and (run_dir / results.NAME).exists():
            results.Results(run_dir, after).close()  # without what was found after the step that the run continues from
        recorder = Recorder(run_dir, names, after, context.console.say)
    recorder.text("config", text)
    recorder.text("parameters", trainer.method.describe(trainer.model))
    context.console.say(
        f"{trainer.steps} steps of {context.config.train.batch_size} sequences on {mesh.world_size} ranks "
        f"(dp_replicate {mesh.device_mesh.size(0)} x dp_shard {mesh.device_mesh.size(1)}); run directory {run_dir}; "
        f"liftdist {__version__} of {Path(__file__).resolve().parents[1]}"
    )
    if (kind := context.config.model.base_dtype) is not None:
        published = ", what sync.to publishes" if context.config.sync.to else ""
        context.console.say(
            f"trained and evaluated over a base rounded to {kind}; exports, deltas{published} hold what is learned over the "
            "original weights; liftdist export --format as_trained writes the model as it is trained"
        )
    return recorder


def _export(trainer: Trainer, attempt: Attempt, console: Console, number: int, name: str) -> None:
    """Write the fine-tuned model of step ``number`` to the folder ``name``, unless an earlier attempt has. Collective."""
    run_dir, base_folder = attempt.run_dir, trainer.inputs.folder
    target = run_dir / name
    if not _is_exported(target, number, trainer.mesh):
        with together():
            step = checkpoint.open_step(run_dir / CHECKPOINTS / f"step-{number:08d}")
            trained = of_run.of_run(step, base_folder)
            if trainer.mesh.is_main and target.exists():  # exported before the run was extended
                target.rename(layout.next_free(target))
        hf.write(trained, base_folder, target, getattr(torch, trainer.config.model.dtype))
        if trainer.mesh.is_main:
            attempt.note("export", step=number, folder=name)
    of = f" of step {number}, the best" if number != trainer.step else ""
    rounded = trainer.config.model.base_dtype is not None
    console.say(f"fine-tuned model{of} in {target}" + (", over the original weights" if rounded else ""))


def _is_exported(target: Path, step: int, mesh: Mesh) -> bool:
    """Whether an earlier attempt exported this step to the folder ``target``. Collective."""
    found: int | None = None
    with together():
        if mesh.is_main:
            found = claims.exported(target)
    return collectives.agree(found == step)
