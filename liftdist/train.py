"""One run, from a config to a fine-tuned model: ``torchrun -m liftdist.train CONFIG [key=value ...]`` on every rank.

    claim the run directory -> inputs -> newest checkpoint, or none -> model, principal weights -> steps -> export

The same command continues a run that was stopped, killed or preempted, from its newest good checkpoint. How a rank ends:
0 finished, 2 something the user can put right, 75 stopped as asked and saved, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from liftdist import config as configs
from liftdist import failures, files, preflight, schema
from liftdist.deltas import delta as deltas
from liftdist.deltas import folder as export
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh, PeerError, Stopped, together
from liftdist.engine.principal import PrincipalWeights
from liftdist.models import weights
from liftdist.runs import changes, checkpoint
from liftdist.runs import claims as rundir
from liftdist.runs import watchdog as signals
from liftdist.runs.claims import CHECKPOINTS, Attempt
from liftdist.runs.saver import Checkpointer
from liftdist.schema import Config, UserError
from liftdist.training import setup as prepare
from liftdist.training.recorder import GIB, Console, Recorder, memory
from liftdist.training.trainer import Trainer, evaluate

STOP = signals.StopRequests()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of a rank."""
    parser = argparse.ArgumentParser(prog="python -m liftdist.train", description="Fine-tune; started on every rank.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--select-only", action="store_true", help="select the principal weights, keep them, stop")
    for flag, (_, help) in changes.FLAGS.items():
        parser.add_argument(flag, action="append_const", const=flag, dest="flags", default=[], help=help)
    options = parser.parse_intermixed_args(arguments)
    signals.die_with_parent()
    met = False  # whether the others are there, and end alike
    try:
        config, text = configs.load(options.config, options.overrides)
        # SIGUSR2 is how the batch script of a SLURM job passes on a warning
        STOP.catch([*config.train.stop_signals, *(["SIGUSR2"] if failures.LOGS in os.environ else [])])
        with meshes.start(config.mesh) as mesh:
            met = True
            if options.select_only:
                prepare.select_only(config, mesh, signals.Pulse(STOP))
            else:
                train(config, mesh, text, changes.allowed_by(options.flags))
    except UserError as error:
        if not failures.say(str(error), failures.USER_ERROR):
            _say(str(error))
        _leave(schema.EXIT_USER_ERROR, met)
    except Stopped as reason:
        typed = json.loads(os.environ.get("LIFTDIST_COMMAND", "[]"))
        how = (
            f"the same command with run_dir={config.run_dir}, without --fresh,"
            if "--fresh" in typed
            else "the same command"
        )
        _say(f"stopped ({reason}); {how} continues")
        _leave(schema.EXIT_STOPPED)
    except PeerError as error:
        failures.say(str(error), failures.LOST_PEERS)
        sys.exit(1)  # the rank that failed shows its traceback
    except BaseException as error:  # SystemExit, too: a rank that left early would pass for one that has finished
        if not failures.record(error) or failures.is_apart():  # else the launcher or the job shows what came first
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)  # at once: threads and libraries would wait for peers that may be gone


def _say(message: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"liftdist: {configs.redact(message)}", file=sys.stderr, flush=True)


def _leave(code: int, all_do: bool = True) -> None:
    """Exit. The launcher learns the code from a file, as torchrun makes every code 1, and starts again what may restart."""
    STOP.ignore()
    status = os.environ.get("LIFTDIST_STATUS_FILE")
    if status:
        Path(status).write_text(str(code))
        sys.exit(0 if all_do else code)
    if code == schema.EXIT_STOPPED and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        sys.exit(0)  # torchrun would start again what was asked to stop
    time.sleep(1.0 if int(os.environ.get("LOCAL_RANK", 0)) else 0.0)  # let the speaking rank finish its line
    sys.exit(code)


def train(config: Config, mesh: Mesh, text: str, allowed: set[str]) -> None:
    """Run ``config`` to its end, from its newest checkpoint on, on all ranks. Collective.

    Args:
        text: the config as it is kept in the run directory.
        allowed: kinds of changes that a run which continues may have, see :mod:`liftdist.changes`.

    Raises:
        Stopped: as asked; what was trained is saved.
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
    with together():
        if mesh.is_main:
            claimed = rundir.claim(run_dir, lambda history: checkpoint.accepted(run_dir, history))
            STOP.watch(run_dir)
    attempt: Attempt = meshes.gather(claimed)[0]
    stacks = run_dir / f"hang-{attempt.number}"
    watchdog = signals.Watchdog(config.train.hang_timeout, stacks, mesh.rank, mesh.world_size)
    outcome: dict[str, Any] = {"outcome": "failed"}
    try:
        with attempt.heartbeat() if mesh.is_main else contextlib.nullcontext():
            with watchdog.watching():
                trainer = _run(config, mesh, text, allowed, attempt, console, signals.Pulse(STOP, watchdog))
            if config.train.export:
                _export(trainer, attempt, console)
        outcome = {"outcome": "finished"}
    except Stopped as reason:
        outcome = {"outcome": "stopped", "reason": str(reason)}
        if mesh.is_main:
            with contextlib.suppress(OSError):
                files.write(run_dir / rundir.STOPPED, json.dumps(outcome | {"attempt": attempt.number}) + "\n")
            STOP.done()
        raise
    except BaseException as error:
        outcome["reason"] = configs.redact(f"{type(error).__name__}: {error}")
        raise
    finally:
        if mesh.is_main:
            attempt.note("end", **outcome)


def _run(
    config: Config, mesh: Mesh, text: str, allowed: set[str], attempt: Attempt, console: Console, pulse: signals.Pulse
) -> Trainer:
    """Everything but the export."""
    run_dir = attempt.run_dir
    with together():
        inputs = prepare.inputs(config, console, mesh.rank / mesh.world_size, pulse)
    shards = mesh.device_mesh.size(1)
    saved = checkpoint.newest(run_dir, attempt.accepts, mesh.rank % shards, shards, console.say, beat=pulse.beat)
    base = weights.digest(inputs.folder, Path(config.cache_dir), pulse.beat)
    origin = changes.origin(config, text, base, inputs.samples.digest)
    first = meshes.gather(origin)[0]
    with together():
        changes.check_alike(origin, first, mesh.rank)
        changed = changes.between(saved.manifest, origin) if saved else []
        changes.refuse(changed, allowed, run_dir)
    if changed:
        console.say("changed since the checkpoint: " + "; ".join(configs.redact(line) for _, line in changed))
    model, principal = prepare.principal(config, inputs.folder, base, mesh, console, pulse, saved is not None)
    model.train()
    trainer = Trainer(config, mesh, inputs, model, principal, pulse.beat)
    if saved is not None:
        with together():
            tensors = saved.read(principal.matrices)
        trainer.restore(saved.manifest["state"], tensors)
        del tensors
        if schema.STATE in {kind for kind, _ in changed}:  # the state means something else now
            principal.refresh(trainer.optimizer)
        console.say(
            f"continuing after step {trainer.step} of {trainer.steps} ({saved.folder}, attempt {attempt.number}), "
            f"learning rate {trainer.schedule.get_last_lr()[0]:.3g}"
            if trainer.step < trainer.steps
            else f"nothing is left to train: step {trainer.step} of {trainer.steps} is done"
        )
    checkpointer = Checkpointer(attempt, mesh, config.checkpoint.keep, saved)
    with together():
        if mesh.is_main:  # not before: what failed until here can be put right and started again
            prepare.describe_run(run_dir, text, mesh)
        after = trainer.step if saved else None if attempt.number == 1 else -1
        recorder = Recorder(run_dir, mesh.is_main, after, console.say)
    recorder.text("config", text)
    recorder.text("parameters", _parameter_counts(model, principal))
    console.say(
        f"{trainer.steps} steps of {config.train.batch_size} sequences on {mesh.world_size} ranks "
        f"(dp_replicate {mesh.device_mesh.size(0)} x dp_shard {mesh.device_mesh.size(1)}); run directory {run_dir}"
    )
    run = _Loop(trainer, recorder, console, checkpointer, pulse, origin)
    try:
        run.to_the_end()
    except Stopped as reason:
        console.say(f"{reason}: saving step {trainer.step}")
        run.save_last()
        raise
    except (UserError, PeerError):  # all ranks are here: what is being written may be finished
        checkpointer.wait(pulse.beat)
        raise
    finally:
        recorder.close()
    return trainer


def _export(trainer: Trainer, attempt: Attempt, console: Console) -> None:
    """Write the fine-tuned model, from the last checkpoint, unless an earlier attempt did. Collective."""
    run_dir, base = attempt.run_dir, trainer.inputs.folder
    target = run_dir / "export"
    if not _is_exported(run_dir, trainer.step, trainer.mesh):
        with together():
            step = checkpoint.open_step(run_dir / CHECKPOINTS / f"step-{trainer.step:08d}")
            trained = deltas.of_run(step, base)
            if trainer.mesh.is_main and target.exists():  # of a shorter run, which was continued
                target.rename(rundir.next_free(target))
        export.export_merged(trained, base, target, trainer.model.dtype)
        if trainer.mesh.is_main:
            attempt.note("export", step=trainer.step)
    console.say(f"fine-tuned model in {target}")


def _is_exported(run_dir: Path, step: int, mesh: Mesh) -> bool:
    """Whether an earlier attempt exported this very step. Collective."""
    events: list[rundir.Event] = []
    with together():
        if mesh.is_main:
            events = [event for events in rundir.attempts(run_dir).values() for event in events]
    exports = [event["step"] for event in events if event["event"] == "export"]
    return meshes.agree(bool(exports) and exports[-1] == step and (run_dir / "export").is_dir())


class _Loop:
    """Steps, evaluations and checkpoints in their order."""

    def __init__(
        self,
        trainer: Trainer,
        recorder: Recorder,
        console: Console,
        checkpointer: Checkpointer,
        pulse: signals.Pulse,
        origin: dict[str, Any],
    ) -> None:
        self.trainer, self.recorder, self.console = trainer, recorder, console
        self.checkpointer, self.pulse, self.origin = checkpointer, pulse, origin
        self._step_seconds = 0.0
        self._lead = float(os.environ.get("LIFTDIST_LEAD", "inf"))  # seconds from a scheduler's warning to its end

    def to_the_end(self) -> None:
        """All steps that are left. Raises ``Stopped``, between steps or inside an evaluation, where all ranks agreed to."""
        trainer, config = self.trainer, self.trainer.config
        trainer.watch.read()
        began, first, tokens = time.perf_counter(), trainer.step, 0.0
        with self.console.progress("training", "step", trainer.steps) as progress:
            while True:
                paused = time.perf_counter()
                self._pause()
                began += time.perf_counter() - paused
                if trainer.step >= trainer.steps:
                    break
                figures = trainer.run_step()
                tokens += figures.pop("local/tokens")
                if trainer.problem:
                    self.console.say(trainer.problem)
                if trainer.step % config.train.log_interval == 0 or trainer.step == trainer.steps:
                    elapsed = time.perf_counter() - began
                    figures |= rank_figures(trainer, elapsed, trainer.step - first, tokens)
                    self.recorder.scalars(trainer.step, figures)
                    self._step_seconds = figures["time/step"]
                    left = figures["time/step"] * (trainer.steps - trainer.step)
                    progress.step(trainer.step, trainer.steps, _note(figures), left)
                    began, first, tokens = time.perf_counter(), trainer.step, 0.0
        self.save_last()

    def _pause(self) -> None:
        """What is due between two steps."""
        trainer, config = self.trainer, self.trainer.config
        self._report_save()
        self.pulse.boundary()
        if self._is_due(config.train.eval_interval) or trainer.step in (0, trainer.steps):
            self._evaluate()
        # a step that went wrong may be followed by more: the checkpoint before them is the one to go back to
        if trainer.step and self._is_due(config.checkpoint.interval) and not trainer.skipped_in_a_row:
            self._save()

    def _is_due(self, interval: int) -> bool:
        return bool(interval) and self.trainer.step % interval == 0

    def _evaluate(self) -> None:
        trainer = self.trainer
        if trainer.inputs.eval_samples is None or trainer.evaluated == trainer.step:
            return
        loss = evaluate(trainer.model, trainer.inputs.eval_samples, trainer.config, trainer.mesh, self.pulse.boundary)
        trainer.evaluated = trainer.step
        self.recorder.scalars(trainer.step, {"eval/loss": loss})
        self.console.say(f"step {trainer.step}: evaluation loss {loss:.4f}")

    def _save(self) -> None:
        """Begin to save the state as it is, unless that was done already."""
        trainer = self.trainer
        began = time.perf_counter()
        self.checkpointer.wait(self.pulse.beat)  # until then ranks may know different things of the save before
        self._report_save()
        if self.checkpointer.last_step == trainer.step:
            return
        state = trainer.principal.state_dict(trainer.optimizer)
        self.checkpointer.save(
            state, trainer.principal.matrices, self.origin | {"step": trainer.step, "state": trainer.state()}
        )
        self.recorder.scalars(trainer.step, {"checkpoint/blocked_seconds": time.perf_counter() - began})

    def save_last(self) -> None:
        """Save, and wait until everything is committed. Raises what went wrong."""
        if self.trainer.step:
            self._save()
            self.checkpointer.wait(self.pulse.beat)
            outcome = self.checkpointer.take_outcome()
            if isinstance(outcome, Exception):
                raise UserError(f"step {self.trainer.step} is not saved: {outcome}") from outcome
            if outcome:
                self.console.say(f"checkpoint {outcome.name}")

    def _report_save(self) -> None:
        outcome = self.checkpointer.take_outcome()
        if isinstance(outcome, OSError | ValueError) and not isinstance(outcome, UserError):
            self.console.say(f"CHECKPOINT FAILED, training goes on: {outcome}")
            self.recorder.scalars(self.trainer.step, {"checkpoint/failed": 1.0})
        elif isinstance(outcome, Exception):
            self.pulse.fail(outcome)
        elif outcome is not None:
            self.console.say(f"checkpoint {outcome.name}")
            self._check_lead(outcome.seconds)
            self.recorder.scalars(
                self.trainer.step, {"checkpoint/seconds": outcome.seconds, "checkpoint/gib": outcome.bytes / GIB}
            )

    def _check_lead(self, save_seconds: float) -> None:
        """Say once if a job would end before it has saved: a save may be under way, and the step, when the warning comes."""
        needed = self._step_seconds + 2 * save_seconds
        if needed > self._lead:
            self.console.say(
                f"the warning comes {self._lead:.0f} s before the time limit, but a step and two saves take {needed:.0f} s: "
                f"set slurm.signal_lead={math.ceil(2 * needed)}"
            )
            self._lead = math.inf


def rank_figures(trainer: Trainer, elapsed: float, steps: int, tokens: float) -> dict[str, float]:
    """Throughput, time by phase and memory of every rank, over the last ``steps`` steps of ``elapsed`` s. Collective."""
    phases = trainer.watch.read()
    ranks = meshes.gather({"tokens": tokens, "phases": phases, "memory": memory(trainer.mesh.device)})
    total = sum(rank["tokens"] for rank in ranks)
    figures = {
        "throughput/tokens_per_second": total / elapsed,
        "throughput/tokens_per_second_per_rank": total / elapsed / len(ranks),
        "throughput/data_wait_share": max(rank["phases"].get("data", 0.0) for rank in ranks) / elapsed,
        "time/step": elapsed / steps,
    }
    for phase in ("forward_backward", "exchange", "update", "refresh"):
        figures[f"time/{phase}"] = max(rank["phases"].get(phase, 0.0) for rank in ranks) / steps
    for number, rank in enumerate(ranks):
        figures |= {f"memory_gib/{key}/rank{number}": value for key, value in rank["memory"].items()}
    return figures


def _note(figures: dict[str, float]) -> str:
    peaks = [value for key, value in figures.items() if "/device_peak/" in key or "/host_peak/" in key]
    on_device = [value for key, value in figures.items() if "/device_peak/" in key]
    return (
        f"loss {figures['train/loss']:.4f}  {figures['throughput/tokens_per_second']:.0f} tokens/s  "
        f"peak {max(on_device or peaks):.1f} GiB"
    )


def _parameter_counts(model: nn.Module, principal: PrincipalWeights) -> str:
    everything = sum(param.numel() for param in model.parameters())
    fullest = max(meshes.gather(principal.values.numel()))
    lines = [
        f"weights of the model      {everything}",
        f"principal weights         {principal.num_selected} ({principal.num_selected / everything:.2%})",
        f"on the fullest rank       {fullest} ({fullest * 20 / GIB:.3f} GiB of values, gradient, moments and indices)",
    ]
    lines += [f"{matrix.name}  {list(matrix.param.shape)}  {matrix.num_selected}" for matrix in principal.matrices]
    return "\n".join(lines)


if __name__ == "__main__":
    failures.start()
    STOP.catch()  # the imports below take seconds in which a signal must not be lost, nor taken for a crash


if __name__ == "__main__":
    main()
