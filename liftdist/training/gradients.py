"""The gradients of batches, for criteria that select weights by them.

The batches are the run's first sequences, in its order: ``train.micro_batch_size`` each, so that one fits in one pass on a single
rank. The shards of a replica divide a batch, in its order; replicas run the same ones. The gradient is that of the loss as a
training step has it, for this batch alone, without dropout and without masked tokens. No position in the data changes: every
selection of a run gathers over the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from liftdist.data.batches import collate, to_device
from liftdist.data.order import BatchOrder
from liftdist.data.tokenised import IGNORED
from liftdist.methods.eva import Passes
from liftdist.registry import LOSSES
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.inputs import Inputs


def of_batches(context: RunContext, inputs: Inputs, model: nn.Module) -> Passes:
    """The forwards, and with gradients the backwards, of batches, see above. Collective over the shards of a replica."""
    config, mesh, samples = context.config, context.mesh, inputs.samples
    shards = mesh.device_mesh.size(1)
    reduction, size = config.train.loss_reduction, config.train.micro_batch_size
    loss = LOSSES.load(config.train.loss).make(config.train)

    def backwards(number: int, before: Callable[[Tensor], None] = lambda _: None) -> Iterator[Tensor]:
        order = BatchOrder(
            samples.lengths,
            config.train.seed,
            config.data.packing,
            config.data.max_length,
            number * size,
            samples.shares,
        )
        sequences = order.batch(0)
        modes = {module: module.training for module in model.modules()}
        for module in modes:  # layers are recomputed in training alone, by their own flag
            module.training = torch.is_grad_enabled() and bool(getattr(module, "gradient_checkpointing", False))
        for begin in range(0, len(sequences), size):
            context.cancellation.beat()
            batch = sequences[begin : begin + size]
            divisor = objective.weigh(collate(samples, batch), reduction)[1]
            first, end = (len(batch) * shard // shards for shard in (mesh.rank % shards, mesh.rank % shards + 1))
            mine = collate(samples, batch[first:end])
            before(mine["labels"] != IGNORED)
            weights, _ = objective.weigh(mine, reduction)
            total = objective.token_losses(model, to_device(mine, mesh.device), loss.per_token, weights)
            mean = total / (divisor or 1)  # a batch without labels has a loss of 0
            if torch.is_grad_enabled():
                mean.backward()
            yield mean.detach()
        for module, training in modes.items():
            module.training = training

    return backwards
