"""Full fine-tuning: all parameters of the decoder, its embedding and its head, by AdamW with dense gradients.

The baseline that sparse methods are compared with, in the same loop. ``selection.modules`` chooses modules by name. Left out are
routers, which choose experts, towers that no text passes through, and scalars, which have no rows.

With ``model.dtype=bfloat16`` the parameters are kept in float32 and computed with in bfloat16; with ``optimizer.dtype=bfloat16``
they, their gradients and the moments are bfloat16, and updates that it rounds away are lost. As is usual, vectors (norms and
biases) have no weight decay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from liftdist.console import GIB
from liftdist.distributed import collectives
from liftdist.engine.adamw import reference_eps
from liftdist.engine.decoder import towers
from liftdist.engine.dense import DenseWeights
from liftdist.engine.gathered import Backwards
from liftdist.engine.matrices import Matrix, Place, describe, fits, routers
from liftdist.errors import UserError
from liftdist.models import build
from liftdist.models.names import NameMap
from liftdist.models.part import Part
from liftdist.runs.context import RunContext
from liftdist.schema import Config


class Full:
    """Whole parameters and their optimizer, with the settings of a run."""

    selection: Path | None = None

    def __init__(self, config: Config, dense: DenseWeights, held: Sequence[list[Matrix]]) -> None:
        """
        Args:
            held: the matrices that each parameter of ``dense`` holds.
        """
        self._config, self.dense = config, dense
        settings = config.optimizer
        vectors = [value for value in dense.values if value.ndim < 2]
        others = [value for value in dense.values if value.ndim >= 2]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._held = held

    @property
    def matrices(self) -> list[Matrix]:
        """The tensors of the base model's files that are trained, or the parts of parameters that are stored apart."""
        return [matrix for held in self._held for matrix in held]

    def changes(self, names: NameMap) -> dict[str, tuple[str, Part | None]]:
        return {matrix.name: names.changed(matrix.name, matrix.place) for matrix in self.matrices}

    def before_step(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def reselect(self, step: int) -> None:
        """Nothing is selected."""

    def reduce(self, divisor: Tensor) -> None:
        self.dense.reduce_gradients(divisor)

    def clip(self) -> Tensor:
        return self.dense.clip_grad_norm_(self._config.optimizer.max_grad_norm)

    def step(self) -> None:
        if self._config.optimizer.reference_numerics:
            eps = reference_eps(self._config.optimizer, 1 + int(self.scalars().get("step", 0)))
            for group in self.optimizer.param_groups:
                group["eps"] = eps
        self.optimizer.step()
        self.stepped()
        self.dense.drop_gradients()
        self.dense.written()

    def stepped(self) -> None:
        """What follows the optimizer's step, while the gradient is there: nothing."""

    def skip(self) -> None:
        self.dense.drop_gradients()

    def non_finite(self) -> list[str]:
        return self.dense.non_finite()

    def state_dict(self) -> dict[str, Tensor]:
        return self._by_matrix(self._moments)

    def weights(self) -> dict[str, Tensor]:
        return self._by_matrix(lambda _: {})

    def _by_matrix(self, moments: Callable[[nn.Parameter], dict[str, Tensor]]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for value, matrices in zip(self.dense.values, self._held, strict=True):
            flat = {"values": value.detach()}
            flat |= {f"optimizer.{key}": tensor for key, tensor in moments(value).items()}
            flat = {key: tensor.reshape(-1).to("cpu", copy=True) for key, tensor in flat.items()}
            for matrix in matrices:
                held = slice(matrix.first_position, matrix.first_position + matrix.numel_local)
                result[f"{matrix.name}/first"] = torch.tensor(
                    [matrix.offset_local] if matrix.numel_local else []
                ).long()
                result |= {f"{matrix.name}/{key}": tensor[held] for key, tensor in flat.items()}
        return result

    def scalars(self) -> dict[str, float]:
        state = self.optimizer.state.get(self.dense.values[0], {})
        return {"step": float(state["step"])} if state else {}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        for value, matrices in zip(self.dense.values, self._held, strict=True):
            if scalars:
                step = torch.tensor(scalars["step"], dtype=torch.float32, device=value.device)
                moments = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {"step": step, **moments}
            targets = {"values": value} | {f"optimizer.{key}": state for key, state in self._moments(value).items()}
            for matrix in matrices:
                held = slice(matrix.first_position, matrix.first_position + matrix.numel_local)
                for key, target in targets.items():
                    if (saved := tensors[f"{matrix.name}/{key}"]).numel():  # nothing of what was not trained before
                        target.view(-1)[held].copy_(saved)
        self.dense.written()

    def at_base(self) -> AbstractContextManager[None]:
        raise RuntimeError("the values of the base model are not kept: the settings that need them are refused")

    def describe(self, model: nn.Module) -> str:
        everything, trained = (
            sum(p.numel() for p in params) for params in (model.parameters(), self.dense.params.values())
        )
        held = max(collectives.gather(sum(value.numel() * 4 * value.element_size() for value in self.dense.values)))
        lines = [
            f"weights of the model      {everything}",
            f"trained weights           {trained} ({trained / everything:.2%})",
            f"on the fullest rank       {held / GIB:.3f} GiB of values, gradient and moments",
        ]
        return "\n".join([*lines, *(f"{name}  {list(param.shape)}" for name, param in self.dense.params.items())])

    def _moments(self, value: nn.Parameter) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in self.optimizer.state.get(value, {}).items() if key != "step"}


def extend(config: Config, model: PreTrainedModel) -> None:
    """Nothing is added."""


def prepare(config: Config, model: PreTrainedModel, names: NameMap) -> NameMap:
    """Freeze what is not trained; keep the trained parameters in ``optimizer.dtype``. The model is on the meta device.

    Raises:
        UserError: a pattern of ``selection.modules`` fits no module with parameters to train.
    """
    trained = {place.param for place in places(config, model).values()}
    for param in model.parameters():
        param.requires_grad_(param in trained)
        if param in trained and config.optimizer.dtype == "float32":
            param.data = param.data.float()
    return names


def places(config: Config, model: PreTrainedModel) -> dict[str, Place]:
    """The parameters to train, by name: those of the modules that fit ``selection.modules``. Raises like :func:`prepare`."""
    patterns = config.selection.modules
    choosing = set(routers(model).values())
    apart = {param for tower in towers(model) for param in tower.parameters()}
    own = {
        name: param
        for name, param in model.named_parameters()
        if param not in choosing and param not in apart and param.ndim and param.is_floating_point()
    }
    for pattern in patterns:
        if not any(fits(name.rpartition(".")[0], [pattern]) for name in own):
            example = next(iter(own)).rpartition(".")[0]
            raise UserError(f"selection.modules: no module with parameters fits {pattern}; one is named {example}")
    return {name: place_of(name, param) for name, param in own.items() if fits(name.rpartition(".")[0], patterns)}


def attach(
    context: RunContext,
    model: PreTrainedModel,
    names: NameMap,
    base_digest: str,
    from_checkpoint: bool = False,
    backwards: Backwards | None = None,
) -> Full:
    """Train the parameters that :func:`prepare` chose, each rank its rows. Collective."""
    dense = weights_of(context, model, "{} parameters")
    apart = {param for tower in towers(model) for param in tower.parameters()}
    for what, frozen in (("routers", set(routers(model).values())), ("towers", apart)):
        if frozen:
            context.console.say(f"frozen: {what}, {sum(param.numel() for param in frozen)} weights")
    config = context.config
    dtype = getattr(torch, config.model.dtype)
    kept = build.kept_in_float32(model, dtype)
    held = [
        _matrices(name, param, names, torch.float32 if name in kept else dtype) for name, param in dense.params.items()
    ]
    return Full(config, dense, held)


def weights_of(context: RunContext, model: PreTrainedModel, where: str) -> DenseWeights:
    """What requires gradients, to train it. Says how much that is.

    Args:
        where: what it is in, with ``{}`` for the number of parameters.
    """
    dense = DenseWeights(model, context.mesh.replicate_group)
    trained, everything = (sum(p.numel() for p in found) for found in (dense.params.values(), model.parameters()))
    share = f"{trained / everything:.2%} of the model's {everything}"
    context.console.say(f"trained: {trained} weights in {where.format(len(dense.params))}, {share}")
    return dense


def _matrices(name: str, param: nn.Parameter, names: NameMap, dtype: torch.dtype) -> list[Matrix]:
    """A parameter as the base model's files hold it: whole, or in tensors of their own, such as the matrices of experts."""
    pieces, whole = names.pieces[name], place_of(name, param)
    called = [name] if len(pieces) == 1 else [piece.source for piece in pieces]
    if len(set(called)) < len(called):  # matrices of one tensor
        called = [f"{name}.{number}" for number in range(len(pieces))]
    return [
        describe(label, dataclasses.replace(whole, rows=piece.rows, first_row=piece.row), dtype)
        for label, piece in zip(called, pieces, strict=True)
    ]


def place_of(name: str, param: nn.Parameter) -> Place:
    """A whole parameter as a matrix, a vector as a column."""
    columns = param.shape[-1] if param.ndim > 1 else 1
    return Place(name, param, param.numel() // columns, columns)
