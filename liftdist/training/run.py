"""One run on all ranks, or several that share a model.

claim the run directory -> inputs -> newest checkpoint, or none -> model and method -> steps -> export

Of several, each sets itself up on the base model and leaves it as that. They take turns: the weights that one has trained are put
into the model, it trains some steps, and the base weights are put back. Everything else of a run is its own.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

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
from liftdist.models.names import NameMap
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
from liftdist.training import memory, setup
from liftdist.training.inputs import Inputs, agree_on_commits, commits, hash_files, prepare_inputs
from liftdist.training.loop import Loop, Pictures
from liftdist.training.publish import Publisher
from liftdist.training.recorder import Recorder
from liftdist.training.trainer import Trainer


def train(config: Config, mesh: Mesh, text: str, allowed: set[str], stop: StopRequests) -> None:
    """:func:`train_all` of one run."""
    train_all([(config, text)], mesh, allowed, stop)


def train_all(
    configs: Sequence[tuple[Config, str]],
    mesh: Mesh,
    allowed: set[str],
    stop: StopRequests,
    turn: int = 1,
    pictures: Pictures | None = None,
) -> None:
    """Train each run to its last step, from its newest checkpoint if it has one. Collective.

    Several share a model, each for ``turn`` steps at a time. One that fails by what the user can correct leaves the others alone.

    Args:
        configs: of each run its config, and the YAML text of it, as written to the run directory. Of several the settings of the
            model, the mesh and the process are the same, see :func:`liftdist.config.load_runs`.
        allowed: kinds of changes that are allowed when a run continues, see :mod:`liftdist.runs.changes`.
        stop: the stop requests of this rank.
        pictures: of a selection, to be recorded at each refresh of runs with ``metrics.images``.

    Raises:
        Stopped: on a stop request, after saving.
        UserError: runs have failed, and the others have ended.
    """
    shared, several = configs[0][0], len(configs) > 1
    if shared.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with together():
        for config, _ in configs:
            preflight.check_cache_dir(config)
            preflight.check_own_answers(config)
    attempts: list[Attempt] = []
    failed: dict[int, UserError] = {}  # by number of the attempt in the list
    outcome: dict[str, Any] = {"outcome": "failed"}
    try:
        for config, _ in configs:
            attempts.append(_claimed(config, mesh, stop))
        stacks = attempts[0].run_dir / f"hang-{attempts[0].number}"
        watchdog = Watchdog(shared.train.hang_timeout, stacks, mesh.rank, mesh.world_size)
        with contextlib.ExitStack() as beating:
            for attempt in attempts if mesh.is_main else ():
                beating.enter_context(attempt.heartbeat())
            runs: list[_Run] = []
            with contextlib.ExitStack() as opened, watchdog.watching():
                for (config, text), attempt in zip(configs, attempts, strict=True):
                    console = Console(mesh.is_main, of=attempt.run_dir.name if several else "")
                    context = RunContext(config, mesh, console, CancellationPoint(stop, watchdog), several)
                    loaded = (runs[0].trainer.model, runs[0].names) if runs else None
                    runs.append(
                        opened.enter_context(_Run(context, text, allowed, attempt, loaded, len(configs), pictures))
                    )
                if several:
                    _in_turn(runs, turn, failed)
                else:
                    runs[0].to_the_end()
            for number, run in enumerate(runs):
                try:
                    if number not in failed:
                        run.export()
                except UserError as error:
                    failed[number] = error
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
        for number, attempt in enumerate(attempts if mesh.is_main else ()):
            own = {"outcome": "failed", "reason": redact(f"UserError: {failed.get(number)}")}
            attempt.note("end", **(own if number in failed else outcome))
    if failed:
        if not several:
            raise failed[0]
        reasons = "; ".join(f"{attempts[number].run_dir.name}: {error}" for number, error in failed.items())
        raise UserError(f"{len(failed)} of {len(configs)} runs failed: {reasons}")


def _claimed(config: Config, mesh: Mesh, stop: StopRequests) -> Attempt:
    """A new attempt at a run. Collective."""
    run_dir = Path(config.run_dir).expanduser()
    claimed: Attempt | None = None
    with together():
        if mesh.is_main:
            claimed = claims.claim(run_dir, lambda history: checkpoint.accepted(run_dir, history))
            stop.watch(run_dir)
    found: Attempt = collectives.gather(claimed)[0]
    return found


def _in_turn(runs: Sequence[_Run], steps: int, failed: dict[int, UserError]) -> None:
    """Train runs that share a model to their ends, each for some steps at a time. Collective.

    Args:
        failed: takes up why runs have failed, by their number.

    Raises:
        Stopped: on a stop request, when all runs are saved.
        UserError: one of them could not be saved then.
    """
    going = dict(enumerate(runs))
    try:
        while going:
            for number, run in [*going.items()]:
                with run.entered():
                    try:
                        if run.turn(steps):
                            del going[number]
                    except UserError as error:  # on all ranks
                        run.console.say(f"FAILED, the others go on: {error}")
                        failed[number] = error
                        del going[number]
    except Stopped as reason:
        unsaved: list[str] = []
        for run in going.values():
            try:
                with run.entered():
                    run.save(reason)
            except UserError as error:
                unsaved.append(f"{run.name}: {error}")
        if unsaved:
            raise UserError("; ".join(unsaved)) from None
        raise


class _Run(contextlib.AbstractContextManager["_Run"]):
    """Everything of one run but its claim. Made by all ranks together, as is all it does.

    Args:
        loaded: the model, and the names of its tensors, that another run has loaded, and left.
        runs: how many share the model; of several each has left it when it is made.
    """

    def __init__(
        self,
        context: RunContext,
        text: str,
        allowed: set[str],
        attempt: Attempt,
        loaded: tuple[PreTrainedModel, NameMap] | None = None,
        runs: int = 1,
        pictures: Pictures | None = None,
    ) -> None:
        config, mesh, console, cancellation = context.config, context.mesh, context.console, context.cancellation
        self.console, self.name = console, attempt.run_dir.name
        self._attempt, self._cancellation = attempt, cancellation
        torch.manual_seed(config.train.seed)
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
        provenance = changes.provenance(
            config, text, base_digest, samples.digest, commits(config), contents, len(samples)
        )
        state_changed = _check_changes(context, provenance, saved, allowed, attempt.run_dir)
        with together():
            if mesh.is_main and (config.eval.tasks or (attempt.run_dir / results.FOLDER).exists()):
                results.check_base(attempt.run_dir, config.model.identity(base_digest))
        model, self.names, method = setup.model_and_method(
            context, inputs.folder, base_digest, from_checkpoint=saved is not None, inputs=inputs, loaded=loaded
        )
        model.train()
        if config.train.fit_memory:
            memory.try_out(context, model, method)
        self.trainer = trainer = Trainer(config, mesh, inputs, model, method, cancellation.beat)
        if saved is not None:
            _resume(context, trainer, saved, attempt, state_changed)
        self._checkpointer = Checkpointer(attempt, mesh, config.checkpoint.keep, saved)
        changed = method.changes(self.names)
        trained = {name: stored for name, (stored, _) in changed.items()}
        copies = {stored: self.names.copies[stored] for stored in trained.values() if stored in self.names.copies}
        parts = {name: part for name, (_, part) in changed.items() if part is not None}

        def snapshot() -> Snapshot:
            return Snapshot(trainer.step, trainer.state(), provenance, trained, parts, copies)

        self._publisher = None
        if config.sync.to is not None:
            self._publisher = Publisher(config.sync, attempt.run_dir, inputs.folder, mesh, method, snapshot)
        self._recorder = _recorder(context, trainer, text, attempt, resumed=saved is not None)
        self.loop = Loop(
            context, trainer, self._recorder, self._checkpointer, snapshot, self._publisher, runs, pictures
        )
        if runs > 1:
            self._leave()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which a shared model is that of this run; afterwards it is the base model."""
        self.trainer.method.enter()
        self.trainer.model.train()  # an evaluation may have been broken off
        self.trainer.routing.is_counting = True
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self.trainer.routing.is_counting = False
        self.trainer.method.leave()

    def turn(self, most: float = math.inf) -> bool:
        """See :meth:`Loop.turn`."""
        with memory.explained(self.trainer.config, self.trainer.mesh.device):
            return self.loop.turn(most)

    def to_the_end(self) -> None:
        """Train, of a model of its own. Raises ``Stopped`` after saving."""
        try:
            self.turn()
        except Stopped as reason:
            self.save(reason)
            raise

    def save(self, reason: Stopped) -> None:
        self.console.say(f"{reason}: saving step {self.trainer.step}")
        self.loop.save_last()

    def export(self) -> None:
        """Write the fine-tuned model, and that of the best step, if the config says so."""
        if self.trainer.config.train.export:
            _export(self.trainer, self._attempt, self.console, self.trainer.step, "export")
            best = self.trainer.best.step
            if best is not None and best != self.trainer.step:
                folder = _checkpoint(self._attempt, best)
                if collectives.agree(self.trainer.mesh.is_main and folder.is_dir()):
                    _export(self.trainer, self._attempt, self.console, best, "export-best")
                else:
                    self.console.say(
                        f"step {best}, the best, is not exported: {folder} could not be saved, or was removed"
                    )

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is None or isinstance(error, UserError | PeerError):  # on all ranks: a running save is committed
                self._checkpointer.wait(self._cancellation.beat)
        finally:
            self._recorder.close()
            if self._publisher is not None:
                self._publisher.close()


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
            # without what was found after the step that the run continues from; what the base model was asked stays
            results.Results(run_dir, after if after is None else max(after, 0)).close()
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
            step = checkpoint.open_step(_checkpoint(attempt, number))
            trained = of_run.of_run(step, base_folder)
            if trainer.mesh.is_main and target.exists():  # exported before the run was extended
                target.rename(layout.next_free(target))
        hf.write(trained, base_folder, target, getattr(torch, trainer.config.model.dtype))
        if trainer.mesh.is_main:
            attempt.note("export", step=number, folder=name)
    of = f" of step {number}, the best" if number != trainer.step else ""
    rounded = trainer.config.model.base_dtype is not None
    console.say(f"fine-tuned model{of} in {target}" + (", over the original weights" if rounded else ""))


def _checkpoint(attempt: Attempt, step: int) -> Path:
    return attempt.run_dir / CHECKPOINTS / f"step-{step:08d}"


def _is_exported(target: Path, step: int, mesh: Mesh) -> bool:
    """Whether an earlier attempt exported this step to the folder ``target``. Collective."""
    found: int | None = None
    with together():
        if mesh.is_main:
            found = claims.exported(target)
    return collectives.agree(found == step)
