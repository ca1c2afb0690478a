"""What a method is: the part of a run that knows what is trained. The trainer drives it, the saver stores what it holds.

    extend, prepare -> the model is sharded and loaded -> attach
    for each step: before_step -> forward and backward -> reduce -> clip -> step, or skip

A module of :data:`liftdist.registry.METHODS` has ``extend(config, model)``, which adds to a model on the meta device what is not
in its files; ``places(config, model)``, what it trains, by name; ``prepare(config, model, names)``, which makes the model ready
for that; and ``attach(context, model, names, base_digest, from_checkpoint, backwards)``, which returns a :class:`Method`;
``backwards`` runs batches of the data, see :data:`liftdist.engine.gathered.Backwards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from liftdist.engine.matrices import Matrix
from liftdist.models.names import NameMap
from liftdist.models.part import Part

SURVIVED = "selection/survived"  # among the metrics of a step before which the weights were selected anew


class Method(Protocol):
    """What is trained, and its optimizer."""

    optimizer: torch.optim.Optimizer
    selection: Path | None  # the cache folder of the first selection, if there is one

    @property
    def matrices(self) -> Sequence[Matrix]:
        """What :meth:`state_dict` holds the state of, in its order."""

    def changes(self, names: NameMap) -> dict[str, tuple[str, Part | None]]:
        """The matrices of the base model that a run changes, by name: the tensor in its files that holds each, and where, unless
        it is the whole tensor. Raises ``UserError`` for one that is stored in several."""

    def before_step(self, step: int, steps: int) -> dict[str, float]:
        """What is due before the forward of ``step``, counted from 1, of the run's ``steps``; metrics by tag. Collective."""

    def reselect(self, step: int) -> None:
        """Choose again what is trained, after loading a state of ``step`` that was made with other settings. Collective."""

    def reduce(self, divisor: Tensor) -> None:
        """Sum the gradient over the replicas and divide it by the divisor of the global batch's loss. Collective."""

    def clip(self) -> Tensor:
        """Clip the gradient to ``optimizer.max_grad_norm``; return its norm before clipping, ``[]``. Collective."""

    def step(self) -> None:
        """Update the weights, and clear the gradient."""

    def skip(self) -> None:
        """Clear the gradient, as if there had been no backward."""

    def non_finite(self) -> list[str]:
        """Names of what has a gradient on this rank that is not finite."""

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank holds beyond the base model, copied to the host: ``NAME/KEY`` of each of :attr:`matrices`.

        Either entries of it, ``indices`` and what belongs to each, see :meth:`PrincipalWeights.state_dict`, or all of this rank's
        rows: ``first`` ``[1]`` int64, the flat index of the first entry in the whole matrix, absent (``[0]``) if there are none,
        ``values`` and other keys, one element for each entry.
        """

    def weights(self) -> dict[str, Tensor]:
        """:meth:`state_dict` without the optimizer's state."""

    def scalars(self) -> dict[str, float]:
        """The scalar states of the optimizer, equal on all ranks."""

    def load_state_dict(self, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
        """Load :meth:`state_dict`, cut to this rank's rows, and :meth:`scalars` into a model that holds the base weights."""

    def at_base(self) -> AbstractContextManager[None]:
        """A context in which the model is the base model; used if ``config.keeps_base``."""

    def leave(self) -> None:
        """Make the model the base model, for other runs. Of ``method=lift`` alone, as :meth:`enter`."""

    def enter(self) -> None:
        """Make the model what it was when this left it, to the bit."""

    def describe(self, model: nn.Module) -> str:
        """A summary of what is trained in plain text. Collective."""
