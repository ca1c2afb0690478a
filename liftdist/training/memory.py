"""Whether a step fits in the memory of a rank: tried out before the first one, and said where it does not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from liftdist.data.batches import to_device
from liftdist.methods.base import Method
from liftdist.registry import LOSSES
from liftdist.runs.context import RunContext
from liftdist.schema import Config
from liftdist.training import objective
from liftdist.training.stopwatch import memory


def try_out(context: RunContext, model: PreTrainedModel, method: Method) -> None:
    """Forward and backward of the largest micro-batch that a run can have. No weight and no state changes. Collective.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    config, mesh = context.config, context.mesh
    loss = LOSSES.load(config.train.loss).make(config.train)
    rows = min(config.train.micro_batch_size, math.ceil(config.train.batch_size / mesh.world_size))
    positions = torch.arange(config.data.max_length).repeat(rows, 1)
    tokens = positions % model.get_input_embeddings().num_embeddings  # an expert that gets all of them would need more
    batch = to_device({"input_ids": tokens, "position_ids": positions, "labels": tokens}, mesh.device)
    with explained(config):
        base = None
        if loss.needs_base:
            with method.at_base():
                base = objective.base_outputs(model, batch)
        objective.token_losses(model, batch, loss.per_token, base=base).backward()
    method.skip()
    peak = memory(mesh.device).get("device_peak")
    measured = "" if peak is None else f", and takes {peak:.2f} GiB at its peak here"
    context.console.say(
        f"train.fit_memory: the largest micro-batch, {rows} x {config.data.max_length} tokens, fits{measured}"
    )
    context.cancellation.beat()


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Say what helps in the first line of an error about memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        ways = [f"lower train.micro_batch_size={config.train.micro_batch_size}"]
        ways += config.model.lighter(on_gpu=isinstance(error, torch.OutOfMemoryError))
        ways += ["lower data.max_length"] if config.train.fit_memory else ["set train.fit_memory=true"]
        first = next(iter(str(error).splitlines()), "")
        raise torch.OutOfMemoryError(
            f"{', '.join(ways[:-1])} or {ways[-1]}; liftdist plan says what takes the memory ({first})"
        ) from error
