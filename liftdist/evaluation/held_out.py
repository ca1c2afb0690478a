"""Means over all labelled tokens of the held-out data, each of the same weight, whatever the data says of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liftdist.data.batches import collate, to_device
from liftdist.data.order import split_micro_batches
from liftdist.data.tokenised import IGNORED, Samples
from liftdist.runs.context import RunContext
from liftdist.training.inputs import Inputs

Summed = Callable[[dict[str, Tensor]], Tensor]  # of a batch: the sum over its labelled tokens, []


def means(context: RunContext, inputs: Inputs, model: nn.Module, tag: str, summed: Summed) -> dict[str, float]:
    """The mean over all sets of held-out data, ``eval/TAG``, and, of several, that of each, ``eval/NAME/TAG``. Collective.

    Returns:
        Means by tag; none without held-out data.
    """
    if not inputs.held_out:
        return {}
    model.eval()
    totals = torch.stack([_totals(context, samples, summed) for samples in inputs.held_out.values()])
    model.train()
    dist.all_reduce(totals)
    figures = {f"eval/{tag}": (totals[:, 0].sum() / totals[:, 1].sum()).item()}
    if len(inputs.held_out) > 1:
        of_sets = (totals[:, 0] / totals[:, 1]).tolist()
        figures |= {f"eval/{name}/{tag}": mean for name, mean in zip(inputs.held_out, of_sets, strict=True)}
    return figures


@torch.no_grad()
def _totals(context: RunContext, samples: Samples, summed: Summed) -> Tensor:
    """This rank's part of the sum over ``samples``, and of the number of labelled tokens: ``[2]`` float64."""
    mesh, micro_batch_size = context.mesh, context.config.train.micro_batch_size
    everything = [[sample] for sample in range(len(samples))]
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for micro in split_micro_batches(everything, samples.lengths, mesh.rank, mesh.world_size, micro_batch_size):
        context.cancellation.boundary()
        batch = to_device(collate(samples, micro), mesh.device)
        totals[0] += summed(batch)
        totals[1] += int((batch["labels"] != IGNORED).sum())
    return totals
