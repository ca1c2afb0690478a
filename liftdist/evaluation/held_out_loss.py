"""Mean cross-entropy over all labelled tokens of ``data.eval_path``, whatever ``train.loss_reduction`` is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from liftdist.data.batches import collate, to_device
from liftdist.data.order import split_micro_batches
from liftdist.data.tokenised import IGNORED, Samples
from liftdist.distributed.mesh import Mesh
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.inputs import Inputs


def run(context: RunContext, inputs: Inputs, model: nn.Module) -> dict[str, float]:
    """``{"eval/loss": mean loss}``, or ``{}`` without held-out data. Collective."""
    if inputs.eval_samples is None:
        return {}
    micro_batch_size, boundary = context.config.train.micro_batch_size, context.cancellation.boundary
    return {"eval/loss": mean_loss(model, inputs.eval_samples, micro_batch_size, context.mesh, boundary)}


@torch.no_grad()
def mean_loss(
    model: nn.Module, samples: Samples, micro_batch_size: int, mesh: Mesh, boundary: Callable[[], None] = lambda: None
) -> float:
    """Mean loss over all labelled tokens of ``samples``; ``boundary`` is called between micro-batches. Collective."""
    model.eval()
    everything = [[sample] for sample in range(len(samples))]
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for micro in split_micro_batches(everything, samples.lengths, mesh.rank, mesh.world_size, micro_batch_size):
        boundary()
        batch = to_device(collate(samples, micro), mesh.device)
        totals[0] += objective.token_losses(model, batch)
        totals[1] += int((batch["labels"] != IGNORED).sum())
    model.train()
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()
