"""LoRA and its variants DoRA, rsLoRA and PiSSA, as the library peft computes them: see :mod:`liftdist.models.adapters`.

The base weights are frozen and sharded. An adapter is sharded with its layer, each matrix by rows, and trained as whole
parameters are: float32 masters, gathered in ``model.dtype``, AdamW. With ``optimizer.dtype=bfloat16`` they are bfloat16 too.

Initial values are those of peft for a seed made of ``train.seed`` and the module's name, so they are the same on any ranks.
For DoRA and PiSSA peft looks at the whole base weight: every rank does so for its share of the modules, and sends what it finds.
PiSSA's base weights, ``W - s B_0 A_0``, are computed again whenever a run continues, from ``A_0`` and ``B_0`` in the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import local_tensor, rows_local, rows_of
from liftdist.engine.dense import DenseWeights
from liftdist.engine.gathered import Backwards
from liftdist.engine.matrices import Matrix, Place, describe, fits, principal_matrices
from liftdist.errors import UserError
from liftdist.methods.full import Full, place_of, weights_of
from liftdist.models import adapters
from liftdist.models.names import NameMap, Part
from liftdist.runs.context import RunContext
from liftdist.schema import Config

INITIAL = "initial"  # key of A_0 and B_0 in a checkpoint


class Lora(Full):
    """The adapters of a model and their optimizer, with the settings of a run."""

    def __init__(
        self,
        config: Config,
        dense: DenseWeights,
        held: Sequence[list[Matrix]],
        layers: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config, dense, held)
        self.layers = layers  # of peft, by module
        self._say: Callable[[str], None] | None = say  # until the first gradient has been looked at
        self.initial: dict[str, Tensor] = {}  # this rank's rows of A_0 and B_0 of PiSSA on the host, by parameter

    def changes(self, names: NameMap) -> dict[str, tuple[str, Part | None]]:
        found: dict[str, tuple[str, Part | None]] = {}
        for name, layer in self.layers.items():
            place = Place(f"{name}.base_layer.weight", layer.base_layer.weight, *layer.base_layer.weight.shape)
            found[f"{name}.weight"] = names.changed(name, place)
            if layer.fan_in_fan_out:
                stored, part = names.holding(name, place)
                found[f"{name}.weight"] = stored, Part(part.offset, part.column, part.row)
        return found

    def initialise(self, rank: int, ranks: int, progress: Callable[[int, int], None]) -> None:
        """Give all adapters their initial values. Collective.

        Args:
            progress: called on every rank with the number of modules done and their total.

        Raises:
            UserError: a base weight has no decomposition, because it is not finite.
        """
        modules = list(self.layers.items())
        for first in range(0, len(modules), ranks):
            share = modules[first : first + ranks]
            mine = None
            for owner, (_, layer) in enumerate(share if self._config.lora.variant in ("dora", "pissa") else ()):
                whole = _whole(layer.base_layer.weight)
                if owner == rank:
                    mine = adapters.matrix(layer, whole).float().contiguous()
            made: dict[str, Tensor] = {}
            with together():
                if rank < len(share):
                    made = self._made(*share[rank], mine)
            for owner, (name, layer) in enumerate(share):
                self._receive(name, layer, made, owner, owner == rank)
            progress(first + len(share), len(modules))
        self.dense.written()

    def _made(self, name: str, layer: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """The initial values of a module's adapter, by the parameter's name in the module, from ``weight [m, n]`` float32."""
        if weight is None:
            weight = torch.empty(layer.out_features, layer.in_features)  # of which nothing is read
        elif not weight.isfinite().all():
            raise UserError(f"{name}.weight of the base model holds a value that is not finite")
        alone = adapters.alone(self._config.lora, weight, f"{self._config.train.seed} {name}")
        return {key: param.detach() for key, param in alone.named_parameters() if not key.startswith("base_layer.")}

    def _receive(self, name: str, layer: Any, made: dict[str, Tensor], owner: int, is_owner: bool) -> None:
        """Take the initial values of a module's adapter from the rank that made them. Collective."""
        for key, param in layer.named_parameters():
            if key.startswith("base_layer."):
                continue
            value = torch.empty(param.shape, device=param.device)
            if is_owner:
                value.copy_(made[key])
            if dist.is_initialized():
                dist.broadcast(value, owner)
            begin, end = rows_of(param)
            rows = local_tensor(param)
            rows.copy_(value[begin:end])
            if self._config.lora.variant == "pissa":
                self.initial[f"{name}.{key}"] = rows.to("cpu", torch.float32, copy=True)  # as rounded
        if self._config.lora.variant == "pissa":
            self._subtract(name, layer)

    @torch.no_grad()
    def _subtract(self, name: str, layer: Any) -> None:
        """Leave in a base weight what PiSSA's initial adapter does not hold. Collective."""
        a, b = (
            _gathered(self.initial[f"{name}.{key}.weight"], layer.get_parameter(f"{key}.weight"))
            for key in (f"lora_A.{adapters.ADAPTER}", f"lora_B.{adapters.ADAPTER}")
        )
        first, rows = rows_local(layer.base_layer.weight)
        held = slice(first, first + len(rows))
        # in float64, so that rows do not depend on which others are computed with them
        product = (b[held].double() @ a.double()) if not layer.fan_in_fan_out else (b.double() @ a[:, held].double()).T
        rows.copy_(rows.double() - layer.scaling[adapters.ADAPTER] * product)

    def reduce(self, divisor: Tensor) -> None:
        if self._say is not None:
            layers = self.layers.items()
            if idle := [name for name, layer in layers if all(param.grad is None for param in layer.parameters())]:
                others = f" and {len(idle) - 1} other modules" if len(idle) > 1 else ""
                self._say(
                    f"adapters of {idle[0]}{others} took no part in the first step: where a model uses weights in its own way, "
                    f"leave such modules out of lora.modules"
                )
            self._say = None
        super().reduce(divisor)

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        for matrix in self.matrices if self.initial else ():
            state[f"{matrix.name}/{INITIAL}"] = self.initial[matrix.place.parameter].flatten()
        return state

    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        for matrix in self.matrices:
            if tensors[f"{matrix.name}/values"].numel() != matrix.numel_local:
                raise UserError(
                    f"{matrix.name} is not in the checkpoint: no adapters can be added to a run; restore lora.modules, or use "
                    f"--fresh"
                )
        super().load_state_dict(tensors, scalars)
        if self._config.lora.variant == "pissa":
            for matrix in self.matrices:
                shape = -1, matrix.columns
                self.initial[matrix.place.parameter] = tensors[f"{matrix.name}/{INITIAL}"].view(shape)
            for name, layer in self.layers.items():
                self._subtract(name, layer)
            self.dense.written()

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        adapters.enable(self.layers.values(), False)
        try:
            yield
        finally:
            adapters.enable(self.layers.values(), True)


def extend(config: Config, model: PreTrainedModel) -> None:
    """Add adapters without values, in the dtype that they are computed with, and freeze all else.

    Raises:
        UserError: like :func:`adapters.inject`.
    """
    adapters.inject(model, config.lora, patterns(config))
    for param in adapters.parameters(model).values():
        param.data = param.data.to(getattr(torch, config.model.dtype))


def places(config: Config, model: PreTrainedModel) -> dict[str, Place]:
    """The parameters of the adapters, by name."""
    return {name: place_of(name, param) for name, param in adapters.parameters(model).items()}


def prepare(config: Config, model: PreTrainedModel, names: NameMap) -> NameMap:
    """Keep adapters in ``optimizer.dtype``. Until they have values, in :func:`attach`, the model is the base model."""
    adapters.enable(adapters.layers(model).values(), False)
    for param in adapters.parameters(model).values():
        param.data = param.data.to(getattr(torch, config.optimizer.dtype))
    return adapters.renamed(names, model)


def patterns(config: Config) -> list[str]:
    """Of the modules that get adapters."""
    return config.lora.modules or config.selection.modules


def attach(
    context: RunContext,
    model: PreTrainedModel,
    names: NameMap,
    base_digest: str,
    from_checkpoint: bool = False,
    backwards: Backwards | None = None,
) -> Lora:
    """Train the adapters that :func:`prepare` added. Collective."""
    config = context.config
    layers = adapters.layers(model)
    dense = weights_of(context, model, f"adapters of {len(layers)} modules")
    dtype = getattr(torch, config.model.dtype)
    held = [[describe(adapters.exported(name), place_of(name, param), dtype)] for name, param in dense.params.items()]
    lora = Lora(config, dense, held, layers, context.console.say)
    shared = [name for name, place in principal_matrices(model, ["*"]).items() if name != place.parameter]
    if left := sum(fits(name.removesuffix(".weight"), patterns(config)) for name in shared):
        context.console.say(f"without adapters: {left} matrices of experts, which share their parameters")
    if not from_checkpoint:
        with context.console.progress("initialising", "modules") as progress:
            lora.initialise(context.mesh.rank, context.mesh.world_size, context.cancellation.at_boundaries(progress))
    adapters.enable(layers.values(), True)
    return lora


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of which this rank holds rows, without autograd. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(rows: Tensor, like: Tensor) -> Tensor:
    """The whole of which this rank has ``rows``, sharded as ``like`` is. Collective."""
    rows = rows.to(like.device)
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
