"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from liftdist import environment
from liftdist.console import GIB
from liftdist.distributed import collectives
from liftdist.errors import UserError
from liftdist.methods.base import SURVIVED, Method
from liftdist.registry import EVALUATIONS
from liftdist.runs.context import RunContext
from liftdist.runs.manifest import Snapshot
from liftdist.runs.saver import Checkpointer
from liftdist.schema import Config
from liftdist.training.publish import Publisher
from liftdist.training.recorder import Recorder
from liftdist.training.stopwatch import memory
from liftdist.training.trainer import Trainer

#: Tags and images ``[height, width, 3]`` uint8 of what a method has selected: drawn one by one on the main rank, which the second
#: argument says; none on others. The call is collective.
Pictures = Callable[[Method, bool], Iterator[tuple[str, np.ndarray]]]


class Loop:
    """Steps, with the evaluations and checkpoints that are due between them."""

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer,
        recorder: Recorder,
        checkpointer: Checkpointer,
        snapshot: Callable[[], Snapshot],
        publisher: Publisher | None = None,
        runs: int = 1,
        pictures: Pictures | None = None,
    ) -> None:
        self._context, self.trainer, self.recorder = context, trainer, recorder
        self.console, self.cancellation = context.console, context.cancellation
        self.checkpointer, self._snapshot, self._publisher = checkpointer, snapshot, publisher
        self._step_seconds = 0.0
        self._failed_saves = self._failed_in_a_row = 0
        self._saved = f"step-{checkpointer.last_step:08d}" if checkpointer.last_step else None
        self._runs = runs  # that share the model
        self._pictures = pictures if trainer.config.metrics.images else None
        self._lead = environment.LEAD.get(math.inf)  # seconds from the scheduler's warning to the time limit

    def turn(self, most: float = math.inf) -> bool:
        """Run the remaining steps, but not more than ``most``. Raises ``Stopped`` on all ranks, between steps or inside an
        evaluation.

        Returns:
            Whether the run has come to its end. What is due after the last step of a turn is done in the next one.
        """
        trainer, config = self.trainer, self.trainer.config
        trainer.watch.read()
        last = trainer.step + most
        began, first, tokens = time.perf_counter(), trainer.step, 0.0
        with self.console.progress("training", "steps", trainer.steps) as progress:
            while trainer.step < last:
                paused = time.perf_counter()
                self._pause()
                began += time.perf_counter() - paused
                if trainer.step >= trainer.steps:
                    break
                if reason := trainer.best.reason_to_stop():
                    self.console.say(f"training ends after step {trainer.step} of {trainer.steps}: {reason}")
                    break
                figures = trainer.run_step()
                tokens += figures.pop("local/tokens")
                if trainer.problem:
                    self.console.say(trainer.problem)
                if self._pictures is not None and SURVIVED in figures:
                    self._draw(self._pictures)
                if trainer.step % config.train.log_interval == 0 or trainer.step == trainer.steps:
                    elapsed = time.perf_counter() - began
                    figures |= rank_figures(trainer, elapsed, trainer.step - first, tokens)
                    figures |= trainer.routing.figures()
                    self.recorder.scalars(trainer.step, figures)
                    self._step_seconds = figures["time/step"]
                    left = figures["time/step"] * (trainer.steps - trainer.step)
                    progress.step(trainer.step, trainer.steps, _note(figures), left)
                    began, first, tokens = time.perf_counter(), trainer.step, 0.0
            else:
                return False
        if self._publisher is not None:
            self._publish(self._publisher, is_end=True)
        self.save_last()
        return True

    def _pause(self) -> None:
        """Between two steps: report saves, act on stop requests, evaluate and save if due."""
        trainer, config = self.trainer, self.trainer.config
        self._report_save()
        self.cancellation.boundary()
        is_end = trainer.step in (0, trainer.steps)
        due = [name for name in EVALUATIONS if is_end or self._is_due(_interval(config, name))]
        is_best = False
        if due and trainer.evaluated != trainer.step:
            is_best = self._evaluate(due)
            if trainer.best.reason_to_stop():  # so this is the end, after which all are made
                self._evaluate([name for name in EVALUATIONS if name not in due])
        # more skipped steps may follow and end the run: the newest checkpoint must be from before the first of them
        if is_best or (trainer.step and self._is_due(config.checkpoint.interval) and not trainer.skipped_in_a_row):
            self._save()
        if self._publisher is not None and trainer.step and self._is_due(self._publisher.interval):
            self._publish(self._publisher)

    def _draw(self, pictures: Pictures) -> None:
        """Record what a refresh has selected. Training continues if that cannot be drawn."""
        drawn = pictures(self.trainer.method, self.trainer.mesh.is_main)
        try:
            for tag, pixels in drawn:
                self.recorder.image(self.trainer.step, tag, pixels)
        except Exception as error:
            self.console.say(f"images: cannot be drawn: {type(error).__name__}: {error}")

    def _publish(self, publisher: Publisher, is_end: bool = False) -> None:
        """Publish the current weights as a version, unless they are published already."""
        if (step := self.trainer.step) != publisher.last_step:
            said, figures = publisher.publish(step)
            if not figures and is_end:  # no next version makes up for it
                run, to = self.trainer.config.run_dir, self.trainer.config.sync.to
                command = f"`liftdist sync {run} --to {to} --once` publishes it"
                said = f"SYNC FAILED, step {step} is not published: {said}; {command}"
            elif not figures:
                said = f"SYNC FAILED, training continues: {said}"
            self.console.say(said)
            self.recorder.scalars(step, figures or {"sync/failed": 1.0})

    def _is_due(self, interval: int) -> bool:
        return bool(interval) and self.trainer.step % interval == 0

    def _evaluate(self, names: Sequence[str]) -> bool:
        """Whether the step is the best so far."""
        trainer = self.trainer
        figures: dict[str, float] = {}
        for name in names:
            run = EVALUATIONS.load(name).run
            figures |= run(self._context, trainer.inputs, trainer.model, trainer.method, trainer.step)
        if figures:
            trainer.evaluated = trainer.step
            self.recorder.scalars(trainer.step, figures)
            shown = ", ".join(
                f"evaluation {tag.removeprefix('eval/')} {value:.4f}"
                for tag, value in figures.items()
                if not tag.endswith(("/low", "/high"))
            )
            self.console.say(f"step {trainer.step}: {shown}")
        return not trainer.skipped_in_a_row and trainer.best.compare(trainer.step, figures)

    def _save(self) -> None:
        """Start to save the current state, unless it is saved already."""
        trainer = self.trainer
        began = time.perf_counter()
        self.checkpointer.wait(
            self.cancellation.beat
        )  # before that, ranks may differ in what they know of the previous save
        self._report_save()
        if self.checkpointer.last_step == trainer.step:
            return
        self.checkpointer.best = trainer.best.step  # not earlier: the save before would remove the former best
        self.checkpointer.save(trainer.method.state_dict(), trainer.method.matrices, self._snapshot())
        self.recorder.scalars(trainer.step, {"checkpoint/blocked_seconds": time.perf_counter() - began})

    def save_last(self) -> None:
        """Save the current state and wait for its commit. Raises the error of a save that failed."""
        if self.trainer.step:
            self._save()
            self.checkpointer.wait(self.cancellation.beat)
            outcome = self.checkpointer.take_outcome()
            if isinstance(outcome, OSError | UserError):
                raise UserError(f"step {self.trainer.step} is not saved: {outcome}; {self._newest()}") from outcome
            if isinstance(outcome, Exception):
                raise outcome
            if outcome:
                self.console.say(f"checkpoint {outcome.name}")
        if self._failed_saves:
            self.console.say(f"{self._failed_saves} saves failed during this run; the last one succeeded")

    def _report_save(self) -> None:
        outcome = self.checkpointer.take_outcome()
        if isinstance(outcome, OSError):
            self._failed_saves += 1
            self._failed_in_a_row += 1
            again = f" ({self._failed_in_a_row} in a row)" if self._failed_in_a_row > 1 else ""
            self.console.say(f"CHECKPOINT FAILED{again}, training continues: {outcome}; {self._newest()}")
            self.recorder.scalars(self.trainer.step, {"checkpoint/failed": float(self._failed_in_a_row)})
        elif isinstance(outcome, Exception):
            self.cancellation.fail(outcome)
        elif outcome is not None:
            self._failed_in_a_row, self._saved = 0, outcome.name
            self.console.say(f"checkpoint {outcome.name}")
            self._check_lead(outcome.seconds)
            self.recorder.scalars(
                self.trainer.step, {"checkpoint/seconds": outcome.seconds, "checkpoint/gib": outcome.bytes / GIB}
            )

    def _newest(self) -> str:
        return f"the newest checkpoint is {self._saved}" if self._saved else "there is no checkpoint yet"

    def _check_lead(self, save_seconds: float) -> None:
        """Warn once if the time limit would end the job before it has saved.

        A step and a save may be running when the scheduler's warning arrives; the last save of each run follows them.
        """
        saves = 1 + self._runs
        needed = self._step_seconds + saves * save_seconds
        if needed > self._lead:
            self.console.say(
                f"SLURM's warning comes {self._lead:.0f} s before the time limit, but a step and {saves} saves take "
                f"{needed:.0f} s: set slurm.signal_lead={math.ceil(2 * needed)}"
            )
            self._lead = math.inf


def _interval(config: Config, evaluation: str) -> int:
    """Steps between two evaluations of a kind."""
    return config.eval.interval if evaluation == "tasks" else config.train.eval_interval


def rank_figures(trainer: Trainer, elapsed: float, steps: int, tokens: float) -> dict[str, float]:
    """Throughput, seconds per phase and memory of every rank, over ``steps`` steps in ``elapsed`` seconds. Collective.

    Args:
        tokens: processed by this rank.

    Returns:
        Metrics by tag; a phase's time is that of the slowest rank, per step.
    """
    phases = trainer.watch.read()
    ranks = collectives.gather({"tokens": tokens, "phases": phases, "memory": memory(trainer.mesh.device)})
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
