"""One optimizer step of a run, and the state that must be saved to continue after it.

gradient of one optimizer step = (sum over ranks and micro-batches of the gradient of the weighted sum of token losses)
                                 / (labels, or samples with labels, in the global batch), see objective.py

The order of the samples is a function of (seed, epoch), random numbers of (seed, step, rank), the learning rate of the step.
So a few counters are the whole state, besides the weights and the optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from liftdist.data.batches import collate, to_device
from liftdist.data.order import BatchOrder, split_micro_batches
from liftdist.distributed.collectives import gather
from liftdist.distributed.mesh import Mesh
from liftdist.errors import UserError
from liftdist.methods.base import Method
from liftdist.registry import LOSSES
from liftdist.schema import Config
from liftdist.training import memory, objective
from liftdist.training.best import Best
from liftdist.training.inputs import Inputs
from liftdist.training.losses import Loss
from liftdist.training.losses.masked_thought import masked
from liftdist.training.routing import Routing
from liftdist.training.stopwatch import Stopwatch

LARGEST_NORM: float = torch.finfo(torch.float32).max ** 0.5


class Trainer:
    """The state of a run, and its optimizer step.

    Args:
        beat: called after each micro-batch, to report progress.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        inputs: Inputs,
        model: PreTrainedModel,
        method: Method,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.mesh, self.inputs, self.model, self.method = config, mesh, inputs, model, method
        self._beat = beat
        train = config.train
        self._loss: Loss = LOSSES.load(train.loss).make(train)
        self.order = BatchOrder(
            inputs.samples.lengths,
            train.seed,
            config.data.packing,
            config.data.max_length,
            train.batch_size,
            inputs.samples.shares,
        )
        self.epochs = train.epochs if train.steps is None else None
        self.steps = train.steps or self.order.steps(train.epochs)
        self.schedule = self._make_schedule()
        self.watch = Stopwatch(mesh.device)
        self.routing = Routing(model, mesh.device)
        self.step = 0
        self.consumed = 0  # sequences, over all ranks and epochs: with the seed, the position in the data
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        self.problem: str | None = None  # why the last step was skipped
        self.best = Best(config)
        self.evaluated = -1  # the step after which the last evaluation ran

    def _make_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        settings = self.config.optimizer
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        warmup_steps = settings.warmup_ratio * self.steps
        warmup = int(warmup_steps) if settings.reference_numerics else round(warmup_steps)
        return get_scheduler(name, self.method.optimizer, num_warmup_steps=warmup, num_training_steps=self.steps)

    def state(self) -> dict[str, Any]:
        """The part of the state that is equal on all ranks, as plain numbers."""
        return {
            "step": self.step,
            "consumed": self.consumed,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluated": self.evaluated,
            "best": self.best.state(),
            "seed": self.config.train.seed,  # with step and rank: the random state
            "optimizer": self.method.scalars(),
        }

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`, and from the tensors of the method's ``state_dict`` cut to this rank's rows."""
        self.method.load_state_dict(tensors, state["optimizer"])
        self.step, self.consumed, self.evaluated = state["step"], state["consumed"], state["evaluated"]
        self.best.restore(state.get("best", {}))
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.epochs is not None:  # the batch size or the data may have changed
            self.steps = self.step + self.order.steps(self.epochs, self.consumed)
            self.schedule = self._make_schedule()
        if self.step:
            position = {"last_epoch": self.step - 1, "_step_count": self.step + 1}
            self.schedule.load_state_dict(self.schedule.state_dict() | position)
            self.schedule.step()

    def run_step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics by tag. Collective.

        If the loss or gradient is not finite on any rank, the step is skipped and counted: no weight changes. If memory runs out,
        it is done again, see :mod:`liftdist.training.memory`.

        Raises:
            UserError: more steps in a row were skipped than ``train.max_skipped_steps``.
        """
        step, self.problem = self.step + 1, None
        self._seed(step)
        figures: dict[str, float] = {}
        with self.watch("refresh"):
            figures |= self.method.before_step(step, self.steps)
        sequences = self.order.batch(self.consumed, self.epochs)
        while True:
            micro_batches = self._split(sequences)
            try:
                totals, micro_losses, tokens = self._backward(micro_batches)
                break
            except RuntimeError as error:
                smaller = memory.halved(self.config, error, self.mesh.world_size)
                if smaller is None:
                    raise
            self._make_smaller(step, smaller)
        with self.watch("exchange"):
            dist.all_reduce(totals)
            self.method.reduce(totals[0, 1].float())
            norm = self.method.clip()
        mean_loss, *of_sources = (totals[:, 0] / totals[:, 1]).tolist()
        named = zip(self.inputs.samples.names, of_sources, totals[1:, 1].tolist(), strict=False)  # none of a single one
        figures |= {f"train/{name}/loss": loss for name, loss, divisor in named if divisor}
        figures |= {
            "train/loss": mean_loss,
            "train/lr": float(self.schedule.get_last_lr()[0]),
            "train/grad_norm": norm.item(),
        }
        # both are reduced over all ranks, so that all decide alike; Adam squares the gradient, in float32
        finite = math.isfinite(mean_loss) and norm.item() < LARGEST_NORM
        if finite:
            self.skipped_in_a_row = 0
            with self.watch("update"):
                self.method.step()
        else:
            self._skip(step, figures, micro_batches, micro_losses)
        self.schedule.step()
        self.step = step
        self.consumed += len(sequences)
        figures |= {"train/sequences": self.consumed, "train/skipped_steps": self.skipped}
        figures["local/tokens"] = tokens
        return figures

    def _seed(self, step: int) -> None:
        random = np.random.SeedSequence([self.config.train.seed, step, self.mesh.rank])
        torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))

    def _split(self, sequences: list[list[int]]) -> list[list[list[int]]]:
        """This rank's micro-batches of a batch."""
        lengths, size = self.inputs.samples.lengths, self.config.train.micro_batch_size
        return split_micro_batches(sequences, lengths, self.mesh.rank, self.mesh.world_size, size)

    def _make_smaller(self, step: int, smaller: Config) -> None:
        """Prepare to do the step again, in the micro-batches of another config."""
        memory.recover(self.model, self.method, self.mesh.device)
        memory.note(self.config, self.mesh.device)
        self._seed(step)
        self.config = smaller
        self.problem = (
            f"step {step}: memory ran out; done again, as all that follow, with "
            f"train.micro_batch_size={smaller.train.micro_batch_size}"
        )

    def _backward(self, micro_batches: list[list[list[int]]]) -> tuple[Tensor, list[Tensor], int]:
        """Forward and backward of this rank's micro-batches.

        Returns:
            ``[1, 2]`` float64, the summed loss and its divisor, and, if there are several sources, a row for each of them
            after that; the loss of each micro-batch; the number of tokens.
        """
        reduction, names = self.config.train.loss_reduction, self.inputs.samples.names
        sources = len(names) if len(names) > 1 else 0
        totals = torch.zeros(1 + sources, 2, dtype=torch.float64, device=self.mesh.device)
        sums = torch.zeros_like(totals[1:, 0]) if sources else None
        micro_losses: list[Tensor] = []
        tokens = 0
        for micro in micro_batches:
            with self.watch("data"):
                batch = self._batch(micro)
                weights, divisor = objective.weigh(batch, reduction)
                if sources:
                    totals[1:, 1] += objective.divisors(batch, reduction, sources).to(totals.device)
                batch = to_device(batch, self.mesh.device)
                tokens += sum(int(self.inputs.samples.lengths[sample]) for sequence in micro for sample in sequence)
            with self.watch("forward_backward"):
                base = self._base_outputs(batch) if self._loss.needs_base else None
                loss = objective.token_losses(self.model, batch, self._loss.per_token, weights, sums, base)
                loss.backward()
                micro_losses.append(loss.detach())
                totals[0, 0] += loss.detach()
                totals[0, 1] += divisor
            self._beat()
        if sums is not None:
            totals[1:, 0] = sums
        return totals, micro_losses, tokens

    def _batch(self, micro: list[list[int]]) -> dict[str, Tensor]:
        """The tensors of a micro-batch of the next step, as the loss wants its input."""
        samples, masking, seed = self.inputs.samples, self._loss.masking, self.config.train.seed
        batch = collate(samples, micro)
        if masking is None:
            return batch
        assert self.inputs.mask_token is not None
        step = self.step + 1
        rate = masking.rate(step, self.steps)
        return masked(batch, micro, samples.lengths, self.inputs.mask_token, rate, seed, step)

    def _base_outputs(self, batch: dict[str, Tensor]) -> Tensor:
        with self.method.at_base():
            return objective.base_outputs(self.model, batch)

    def _skip(
        self, step: int, figures: dict[str, float], micro_batches: list[list[list[int]]], micro_losses: list[Tensor]
    ) -> None:
        """Drop the gradient of a step that is not finite, and report its matrices and samples. Collective."""
        non_finite = [micro for micro, loss in zip(micro_batches, micro_losses, strict=True) if not loss.isfinite()]
        reports = gather((self.method.non_finite(), non_finite, micro_batches))
        self.method.skip()
        self.skipped += 1
        self.skipped_in_a_row += 1
        matrices = sorted({name for names, _, _ in reports for name in names})
        micros = [m for _, found, _ in reports for m in found] or [m for _, _, all_ in reports for m in all_]
        samples = sorted({sample for micro in micros for sequence in micro for sample in sequence})
        where = [self.inputs.samples.where(sample) for sample in samples]
        problem = (
            f"loss {figures['train/loss']}, gradient norm {figures['train/grad_norm']}; "
            f"gradient not finite in {_some(matrices) or 'no matrix'}; samples {_some(where)}"
        )
        if self.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise UserError(
                f"step {step}: {problem}: {self.skipped_in_a_row} steps in a row were skipped (train.max_skipped_steps); "
                f"lower optimizer.lr={self.config.optimizer.lr}, set optimizer.max_grad_norm, or fix the samples"
            )
        self.problem = f"step {step} skipped: {problem}"


def _some(names: list[str]) -> str:
    """The first four of ``names``, and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
