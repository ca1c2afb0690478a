"""``train.fit_memory``: the micro-batch, the recomputation and the gathers with which a run fits the memory that its ranks have.

    memory of the smallest rank -> plans of growing micro-batches -> the largest that fits
                                -> as many layers kept gathered as fit beside it

Recomputation and gathers that the config sets are kept as they are.

:mod:`liftdist.training.memory` tries it out before the first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from liftdist.console import GIB, Console
from liftdist.distributed import collectives
from liftdist.distributed.collectives import together
from liftdist.distributed.mesh import Mesh
from liftdist.errors import UserError
from liftdist.model_settings import SELECTIVE
from liftdist.models import build
from liftdist.models.hub import resolve_config
from liftdist.planning import activations, footprint, shapes
from liftdist.registry import METHODS
from liftdist.schema import Config
from liftdist.training import memory

BUSY = 4096  # tokens of a micro-batch from which layers are not recomputed for the sake of a larger one


class Requirements:
    """The memory that a rank needs for a config, on any number of ranks.

    Raises:
        UserError: as ``liftdist train``, for an invalid model or ``selection.modules``.
    """

    def __init__(self, config: Config) -> None:
        # transformers' default attention: the configured one may not be installed here, and needs about as much memory
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, attn_implementation=None))
        self._hf_config = build.check_type(resolve_config(config.model.path, config.model.revision), config.model)
        model = build.build(self._hf_config, self.config.model)
        METHODS.load(config.method).extend(self.config, model)
        self.size = shapes.sizes(model, self.config)
        self._probes: dict[int, activations.Activations] = {}

    def memory(self, replicas: int, shards: int, others: Sequence[Config] = ()) -> dict[str, int]:
        """Bytes by part, also of the runs that share the model, see :func:`liftdist.planning.footprint.memory`."""
        rows = footprint.rows(self.config, replicas * shards)
        if rows not in self._probes:
            self._probes[rows] = activations.activations(self._hf_config, self.config, rows)
        return footprint.memory(self.size, self.config, shards, self._probes[rows], others)

    def in_micro_batches_of(self, size: int) -> None:
        """Plan for another ``train.micro_batch_size``."""
        train = dataclasses.replace(self.config.train, micro_batch_size=size)
        self.config = dataclasses.replace(self.config, train=train)

    def keeping(self, layers: int) -> None:
        """Plan for another ``model.keep_gathered``."""
        self.config = dataclasses.replace(
            self.config, model=dataclasses.replace(self.config.model, keep_gathered=layers)
        )


def fitting(config: Config, ranks: int, usable: int) -> tuple[Requirements, int]:
    """``config`` with the largest micro-batch whose plan fits in ``usable`` bytes of a rank, with as many layers kept gathered as
    fit then, and the bytes of its plan. A ``model.activation_checkpointing`` or ``model.keep_gathered`` that is set is kept.

    Layers are recomputed selectively if without that not even ``BUSY`` tokens, nor a rank's whole part of the batch, would fit,
    and more do with it; every second layer, and every one, likewise. If nothing fits, the choice of the least memory, whose plan
    is above ``usable``.
    """
    replicas, shards = config.mesh.layout(ranks)
    found: list[tuple[Requirements, int]] = []
    given = config.model.activation_checkpointing
    for recomputed in (given,) if given else (False, SELECTIVE, 2, True):
        model = dataclasses.replace(config.model, activation_checkpointing=recomputed)
        requirements, planned = Requirements(dataclasses.replace(config, model=model)), dict[int, int]()
        try:
            for size in sizes(config, ranks):
                requirements.in_micro_batches_of(size)
                planned[size] = footprint.peak(requirements.memory(replicas, shards))
                if planned[size] > usable:
                    break
        except UserError:
            if recomputed == given:
                raise
            continue  # layers of this model cannot be recomputed so
        fit = [size for size, bytes_ in planned.items() if bytes_ <= usable]
        size = max(fit, default=min(planned))
        requirements.in_micro_batches_of(size)
        found.append((requirements, planned[size]))
        if fit and (size == sizes(config, ranks)[-1] or size * config.data.max_length >= BUSY):
            break
    most = max(
        (one for one in found if one[1] <= usable), key=lambda one: one[0].config.train.micro_batch_size, default=None
    )
    if most is None:
        return min(found, key=lambda one: one[1])
    requirements, peak = most
    chooses = shards > 1 and not config.model.keep_gathered
    for layers in range(1, len(requirements.size.layers) + 1) if chooses else ():
        requirements.keeping(layers)
        if (more := footprint.peak(requirements.memory(replicas, shards))) > usable:
            requirements.keeping(layers - 1)
            break
        peak = more
    return requirements, peak


def sizes(config: Config, ranks: int) -> list[int]:
    """Sizes of a micro-batch, ascending: a rank's part of the batch, or a half of it, a quarter, ..., or one sequence."""
    if config.data.packing and config.model.uses_flash_attention:
        return [1]
    share = math.ceil(config.train.batch_size / ranks)
    return sorted({math.ceil(share / 2**halvings) for halvings in range(share.bit_length() + 1)})


def to_memory(config: Config, mesh: Mesh, console: Console) -> Config:
    """The config of a run with what ``train.fit_memory`` chooses; the same for the same config and ranks, and for what
    :func:`liftdist.training.memory.note` has noted. Collective.

    Raises:
        UserError: the run does not fit, by its plan.
    """
    usable = min(collectives.gather(memory.usable(mesh.device)))
    chosen: tuple[dict[str, Any], int, int] | None = None
    with together():
        if mesh.is_main:
            planned = config
            if mesh.device.type == "cpu":  # what is kept on the host is kept in the same memory
                optimizer = dataclasses.replace(config.optimizer, device=None)
                model = dataclasses.replace(config.model, offload_activations=False)
                planned = dataclasses.replace(config, optimizer=optimizer, model=model)
            usable = min(usable, _lacked(planned, mesh.world_size, usable))
            requirements, peak = fitting(planned, mesh.world_size, usable)
            if peak > usable:
                given = {key: value for key, value in memory.choice(config).items() if key.startswith("model.")}
                more = " ".join(f"{key}={value}" for key, value in given.items() if value and value is not True)
                least = f"with {more}, which it chooses if left out" if more else "whose layers are recomputed"
                raise UserError(
                    f"train.fit_memory: a rank has {usable / GIB:.2f} GiB, and needs {peak / GIB:.2f} GiB even for micro-batches "
                    f"of one sequence {least}; liftdist plan says what takes them and what helps"
                )
            chosen = memory.choice(requirements.config), peak, usable
    values, peak, usable = collectives.gather(chosen)[0]
    console.say(f"{described(values)}: planned {peak / GIB:.2f} of {usable / GIB:.2f} GiB")
    return memory.chosen_in(config, values)


def _lacked(config: Config, ranks: int, usable: int) -> int:
    """The bytes that a plan may take: less than one took that did not fit, where ranks have no more memory than they had then."""
    had, chosen = memory.lacked(config)
    if chosen is None or usable > had:
        return usable
    return footprint.peak(Requirements(memory.chosen_in(config, chosen)).memory(*config.mesh.layout(ranks))) - 1


def described(values: Mapping[str, Any]) -> str:
    """What was chosen, in a line."""
    return f"train.fit_memory: {' '.join(f'{key}={str(value).lower()}' for key, value in values.items())}"


@contextlib.contextmanager
def itemised(config: Config, ranks: int) -> Iterator[None]:
    """Add to an error about memory which parts take the most by the plan of ``config``, and the next smaller plan."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        try:
            parts = largest(config, ranks)
        except (UserError, RuntimeError, MemoryError):
            raise error from None
        raise torch.OutOfMemoryError(f"{parts}; {error}") from error


def largest(config: Config, ranks: int) -> str:
    """The three largest parts of a plan, and the peak of the next smaller one: of half the micro-batch, or with all layers
    recomputed."""
    requirements, layout = Requirements(config), config.mesh.layout(ranks)
    parts = requirements.memory(*layout)
    most = sorted(set(parts) - {footprint.ON_HOST, footprint.OFFLOADED}, key=lambda name: -parts[name])[:3]
    said = f"planned {', '.join(f'{name} {parts[name] / GIB:.2f} GiB' for name in most)}"
    rows = footprint.rows(config, ranks)
    if rows > 1:
        requirements.in_micro_batches_of(rows := math.ceil(rows / 2))
        way = f"train.micro_batch_size={rows}"
    elif config.model.activation_checkpointing is not True:
        model = dataclasses.replace(config.model, activation_checkpointing=True)
        requirements = Requirements(dataclasses.replace(config, model=model))
        way = "model.activation_checkpointing=true"
    else:
        return said
    less = footprint.peak(requirements.memory(*layout))
    return f"{said}; with {way} {less / GIB:.2f} in place of {footprint.peak(parts) / GIB:.2f} GiB in all"
