"""LoRA and its variants, as the library peft computes them: see :mod:`liftdist.models.adapters`.

The base weights are frozen and sharded. An adapter is sharded with its layer, each matrix by rows, and trained as whole
parameters are: float32 masters, gathered in ``model.dtype``, AdamW. With ``optimizer.dtype=bfloat16`` they are bfloat16 too.

Initial values are those of peft for a seed made of ``train.seed`` and the module's name, so they are the same on any ranks.
For DoRA and PiSSA peft looks at the whole base weight: every rank does so for its share of the modules, and sends what it finds.
PiSSA's base weights, ``W - s B_0 A_0``, are computed again whenever a run continues, from ``A_0`` and ``B_0`` in the checkpoint.

The places of SHiRA's values are those that peft draws for ``random_seed=train.seed``: the same in all matrices of a shape, so a
rank keeps them once for each shape. The values are sharded; they are entries of a matrix, and decay as such.
AdaLoRA's ranks are dropped by :mod:`liftdist.methods.allocation`. EVA's initial values are those of :mod:`liftdist.methods.eva`.
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
from liftdist.distributed.sharding import local_tensor, rows_local, rows_of, whole_tensor
from liftdist.engine.dense import DenseWeights
from liftdist.engine.matrices import Matrix, Place, describe, fits, principal_matrices
from liftdist.errors import UserError
from liftdist.methods import eva
from liftdist.methods.allocation import STATES, RankAllocation
from liftdist.methods.full import Full, place_of, weights_of
from liftdist.models import adapters
from liftdist.models.names import NameMap
from liftdist.models.part import Part
from liftdist.runs.context import RunContext
from liftdist.schema import Config

INITIAL = "initial"  # key of A_0 and B_0 in a checkpoint
PLACES = "places"  # key of the flat indices of SHiRA's values in a checkpoint


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
        if config.lora.variant == "shira":
            for group in self.optimizer.param_groups:
                group["weight_decay"] = config.optimizer.weight_decay
        self._ranks = RankAllocation(config.lora, dense) if config.lora.variant == "adalora" else None
        self._step = 0

    def changes(self, names: NameMap) -> dict[str, tuple[str, Part | None]]:
        found: dict[str, tuple[str, Part | None]] = {}
        for name, layer in self.layers.items():
            place = Place(f"{name}.base_layer.weight", layer.base_layer.weight, *layer.base_layer.weight.shape)
            found[f"{name}.weight"] = names.changed(name, place)
            if adapters.is_transposed(layer):
                stored, part = names.holding(name, place)
                found[f"{name}.weight"] = stored, Part(part.offset, part.column, part.row)
        return found

    def initialise(
        self, rank: int, ranks: int, progress: Callable[[int, int], None], directions: dict[str, Tensor]
    ) -> None:
        """Give all adapters their initial values. Collective.

        Args:
            directions: the first rows of each module's A with EVA, by module; empty otherwise.
            progress: called on every rank with the number of modules done and their total.

        Raises:
            UserError: a base weight has no decomposition, because it is not finite.
        """
        modules = list(self.layers.items())
        for first in range(0, len(modules), ranks):
            share = modules[first : first + ranks]
            mine = None
            for owner, (_, layer) in enumerate(share if self._config.lora.variant in ("dora", "pissa") else ()):
                whole = whole_tensor(layer.base_layer.weight)
                if owner == rank:
                    mine = adapters.matrix(layer, whole).float().contiguous()
            made: dict[str, Tensor] = {}
            with together():
                if rank < len(share):
                    made = self._made(*share[rank], mine, directions)
            for owner, (name, layer) in enumerate(share):
                self._receive(name, layer, made, owner, owner == rank)
            progress(first + len(share), len(modules))
        if self._config.lora.variant == "shira":
            self._place(lambda _, shape: adapters.drawn(self._config.lora, shape[0], shape[1], self._config.train.seed))
        self.dense.written()

    def _place(self, places: Callable[[str, torch.Size], Tensor]) -> None:
        """Set the places of SHiRA's values, ``[2, k]`` int32 of a module and its shape, once for each shape."""
        found: dict[torch.Size, Tensor] = {}
        for name, layer in self.layers.items():
            weight = layer.base_layer.weight
            if weight.shape not in found:
                found[weight.shape] = places(name, weight.shape).to(weight.device)
            layer.shira_indices[adapters.ADAPTER] = found[weight.shape]

    def _made(self, name: str, layer: Any, weight: Tensor | None, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        """The initial values of a module's adapter, by the parameter's name in the module, from ``weight [m, n]`` float32."""
        if weight is None:
            weight = torch.empty(layer.out_features, layer.in_features)  # of which nothing is read
        elif not weight.isfinite().all():
            raise UserError(f"{name}.weight of the base model holds a value that is not finite")
        alone = adapters.alone(self._config.lora, weight, f"{self._config.train.seed} {name}")
        made = {key: param.detach() for key, param in alone.named_parameters() if not key.startswith("base_layer.")}
        if name in directions:
            rows = directions[name]
            a = made[f"lora_A.{adapters.ADAPTER}.weight"]
            a.zero_()[: len(rows)] = rows
        return made

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

    def before_step(self, step: int, steps: int) -> dict[str, float]:
        self._step = step
        if self._ranks is not None:
            self._ranks.schedule(steps)
        return {}

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
        if self._ranks is not None:
            self._ranks.regularise()

    def stepped(self) -> None:
        if self._ranks is not None:
            self._ranks.allocate(self._step)

    def scalars(self) -> dict[str, float]:
        is_final = self._ranks is not None and bool(self._ranks.kept)
        return super().scalars() | ({"ranks_final": 1.0} if is_final else {})

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        for matrix in self.matrices if self.initial else ():
            state[f"{matrix.name}/{INITIAL}"] = self.initial[matrix.place.parameter].flatten()
        if self._config.lora.variant == "shira":
            for matrix, layer in zip(self.matrices, self.layers.values(), strict=True):
                rows, columns = layer.shira_indices[adapters.ADAPTER][
                    :, matrix.offset_local : matrix.offset_local + matrix.numel_local
                ]
                state[f"{matrix.name}/{PLACES}"] = (rows * layer.in_features + columns).cpu()
        if self._ranks is not None:
            for matrix in self.matrices:
                found = self._ranks.state(matrix.place.parameter)
                state |= {f"{matrix.name}/{key}": tensor for key, tensor in found.items()}
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
        if self._config.lora.variant == "shira":
            self._place(lambda name, shape: self._saved_places(tensors, name, shape))
        if self._ranks is not None:
            for matrix in self.matrices:
                saved = {key: tensors[f"{matrix.name}/{key}"] for key in STATES if f"{matrix.name}/{key}" in tensors}
                self._ranks.load(matrix.place.parameter, saved, bool(scalars.get("ranks_final")))

    def _saved_places(self, tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
        """The places of a module's values in a checkpoint. Collective."""
        param = self.layers[name].shira_weight[adapters.ADAPTER]
        flat = _gathered(tensors[f"{name}.shira_weight/{PLACES}"], param)
        return torch.stack([flat // shape[1], flat % shape[1]])

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
    backwards: eva.Passes | None = None,
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
        directions: dict[str, Tensor] = {}
        if config.lora.variant == "eva":
            assert backwards is not None
            group = context.mesh.device_mesh.get_group("dp_shard")
            directions = eva.directions(model, layers, config.lora, backwards, group)
            dense.written()  # the passes have gathered parameters: what is written into copies would be lost
            given = [len(rows) for rows in directions.values()]
            context.console.say(f"ranks by what they explain of the inputs: {min(given)} to {max(given)}")
        with context.console.progress("initialising", "modules") as progress:
            lora.initialise(
                context.mesh.rank, context.mesh.world_size, context.cancellation.at_boundaries(progress), directions
            )
    adapters.enable(layers.values(), True)
    return lora


def _gathered(rows: Tensor, like: Tensor) -> Tensor:
    """The whole of which this rank has ``rows``, sharded as ``like`` is. Collective."""
    rows = rows.to(like.device)
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()
