"""Whether a step fits in the memory of a rank: tried out before the first one, said and noted where it does not, and what then.

train.fit_memory     one rank        the step is done again, in micro-batches of half the size
                     several         the others wait for the one that failed: the run ends, and begins again with a smaller plan
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from liftdist import environment, files, processes, schema_tree
from liftdist.console import GIB
from liftdist.data.batches import to_device
from liftdist.methods.base import Method
from liftdist.registry import LOSSES
from liftdist.runs import layout
from liftdist.runs.context import RunContext
from liftdist.schema import Config
from liftdist.training import objective, stopwatch

USABLE = 0.92  # fraction of a GPU's memory; the rest is the CUDA context, NCCL and fragmentation
LIBRARIES = GIB  # memory of a rank on the host besides its tensors
CHOSEN = ("train.micro_batch_size", "model.activation_checkpointing", "model.keep_gathered")


def choice(config: Config) -> dict[str, Any]:
    """What ``train.fit_memory`` chooses, by setting, as a config has it."""
    values = {key: value for key, _, value in schema_tree.walk(config)}
    return {key: values[key] for key in CHOSEN}


def chosen_in(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with what was chosen."""
    for key, value in values.items():
        section, name = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def usable(device: torch.device) -> int:
    """Bytes that the tensors of a rank may take: on a GPU ``USABLE`` of its memory, on the host that of the rank's part of the
    machine's, or of its control group's, without ``LIBRARIES``."""
    if device.type == "cuda":
        return round(USABLE * torch.cuda.get_device_properties(device).total_memory)
    return max(0, round(USABLE * processes.memory() / environment.LOCAL_WORLD_SIZE.get(1)) - LIBRARIES)


def note(config: Config, device: torch.device) -> None:
    """Note in the run directory that a choice did not fit, for the next start of the run. By any rank."""
    path = Path(config.run_dir).expanduser() / layout.LACKED_MEMORY
    with contextlib.suppress(OSError):
        files.write(path, json.dumps({"usable": usable(device), "chosen": choice(config)}))


def lacked(config: Config) -> tuple[int, dict[str, Any] | None]:
    """What :func:`note` has noted: the bytes that a rank had, and the choice, None if there is none."""
    try:
        noted = json.loads((Path(config.run_dir).expanduser() / layout.LACKED_MEMORY).read_text())
        return int(noted["usable"]), {key: noted["chosen"][key] for key in CHOSEN}
    except (OSError, ValueError, LookupError, TypeError):
        return 0, None


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
    with explained(config, mesh.device):
        base = None
        if loss.needs_base:
            with method.at_base():
                base = objective.base_outputs(model, batch)
        objective.token_losses(model, batch, loss.per_token, base=base).backward()
    method.skip()
    peak = stopwatch.memory(mesh.device).get("device_peak")
    measured = "" if peak is None else f", and takes {peak:.2f} GiB at its peak here"
    context.console.say(
        f"train.fit_memory: the largest micro-batch, {rows} x {config.data.max_length} tokens, fits{measured}"
    )
    context.cancellation.beat()


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


@contextlib.contextmanager
def explained(config: Config, device: torch.device) -> Iterator[None]:
    """Say what helps in the first line of an error about memory, and note what did not fit if ``train.fit_memory`` chose it."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        ways = [f"lower train.micro_batch_size={config.train.micro_batch_size}"]
        ways += config.model.lighter(on_gpu=isinstance(error, torch.OutOfMemoryError))
        if config.train.fit_memory:
            note(config, device)
            ways = ["the same command goes on with the next smaller plan of train.fit_memory", "lower data.max_length"]
        else:
            ways += ["set train.fit_memory=true"]
        first = next(iter(str(error).splitlines()), "")
        raise torch.OutOfMemoryError(
            f"{', '.join(ways[:-1])} or {ways[-1]}; liftdist plan says what takes the memory ({first})"
        ) from error


def halved(config: Config, error: RuntimeError, ranks: int) -> Config | None:
    """``config`` with which a step is done again whose memory ran out; None if it is not."""
    size = config.train.micro_batch_size
    if not (ran_out(error) and config.train.fit_memory and ranks == 1 and size > 1):
        return None
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=math.ceil(size / 2)))


def recover(model: PreTrainedModel, method: Method, device: torch.device) -> None:
    """Leave a model and its gradient as if a forward or backward that failed had not been. Of one rank alone."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()
    method.skip()
    if device.type == "cuda":
        torch.cuda.empty_cache()
