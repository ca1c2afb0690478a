"""The gradients of batches, for criteria that select weights by them.

The batches are the run's first sequences, in its order: ``train.micro_batch_size`` each, so that one fits in one pass on a single
rank. The shards of a replica divide a batch; replicas run the same ones. The gradient is that of the loss as a training step has
it, for this batch alone, without dropout and without masked tokens. No position in the data changes: every selection of a run
gathers over the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from liftdist.data.batches import collate, to_device
from liftdist.data.order import BatchOrder
from liftdist.engine.gathered import Backwards
from liftdist.registry import LOSSES
from liftdist.runs.context import RunContext
from liftdist.training import objective
from liftdist.training.inputs import Inputs


def of_batches(context: RunContext, inputs: Inputs, model: nn.Module) -> Backwards:
    """The forwards and backwards of batches, see above. Collective over the shards of a replica."""
    config, mesh, samples = context.config, context.mesh, inputs.samples
    shards = mesh.device_mesh.size(1)
    reduction, size = config.train.loss_reduction, config.train.micro_batch_size
    loss = LOSSES.load(config.train.loss).make(config.train)

    def backwards(number: int) -> Iterator[None]:
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
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        for begin in range(0, len(sequences), size):
            context.cancellation.beat()
            batch = sequences[begin : begin + size]
            divisor = objective.weigh(collate(samples, batch), reduction)[1]
            mine = collate(samples, batch[mesh.rank % shards :: shards])
            weights, _ = objective.weigh(mine, reduction)
            total = objective.token_losses(model, to_device(mine, mesh.device), loss.per_token, weights)
            (total / (divisor or 1)).backward()  # a batch without labels has a loss of 0
            yield
        for module, training in modes.items():
            module.training = training

    return backwards
