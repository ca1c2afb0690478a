"""Criteria by the gradients of several batches.

    for each batch      backward; as soon as the gradient of a parameter is reduced, it is added to the statistic and dropped
    then                the entries of largest statistic, gathered matrix by matrix as weights are

No more dense gradient exists at a time than backward holds of one layer. A rank holds the statistic of its rows alone, float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import local_tensor, rows_of
from liftdist.engine import memory
from liftdist.engine.matrices import Matrix
from liftdist.engine.reductions import FSDPReduction
from liftdist.engine.scores import Scored, Scores
from liftdist.errors import UserError

#: Runs forward and backward for as many batches as asked for, each in one pass, and yields after each this rank's part of the
#: loss. Shards divide a batch, and its gradient is summed over them; replicas run the same batches. Without gradients
#: (``torch.no_grad()``) there is no backward.
Backwards = Callable[[int], Iterable[Tensor]]

#: Of each parameter, by its ``id``: the positions of what is trained, ``[k_local]``, and how far that is from the base model.
Movements = Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gathered(Scored):
    """A criterion whose scores are a statistic of gradients.

    Args:
        batches: how many gradients are gathered.
    """

    batches: int = 8
    are_magnitudes: ClassVar[bool] = True
    states: ClassVar[int] = 1  # float32 tensors that a statistic takes
    #: Whether entries that are trained are marked in the statistic: minus how far they are from the base model. What a refresh
    #: deselects gets its base value back then, and the moments of what it selects are those of the gathered gradients, of which
    #: the first two states are the sum and the sum of squares.
    replaces: ClassVar[bool] = False

    @abstractmethod
    def add(self, states: Sequence[Tensor], gradient: Tensor, weight: Tensor) -> None:
        """Add the gradient of a batch to the ``states``, in place, which are zero at the start. All are ``[p]`` float32."""

    def statistic(self, states: Sequence[Tensor]) -> Tensor:
        """``[p]``, none negative; may overwrite ``states``."""
        return states[0]

    def scores(self, weight: Tensor, num_selected: int, seed: int) -> Scores:  # noqa: ARG002
        """Of the statistic of a matrix, which takes the place of its weights."""
        return lambda rows: weight[rows]


@torch.no_grad()
def gather(
    criterion: Gathered,
    matrices: Sequence[Matrix],
    reductions: Mapping[int, FSDPReduction],
    backwards: Backwards,
    trained: Movements | None = None,
) -> tuple[list[Matrix], dict[int, list[Tensor]]]:
    """The matrices with the statistic of ``criterion`` in place of their weights. Collective.

    Args:
        reductions: how the gradient of each parameter is reduced, by its ``id``.
        trained: to be marked, for a criterion that replaces some.

    Returns:
        The matrices; with ``trained`` the states of each parameter, by its ``id``.

    Raises:
        UserError: a gradient is not finite.
    """
    first = {id(matrix.param): matrix for matrix in reversed(matrices)}  # of each parameter
    params = [matrix.param for matrix in first.values()]
    states = {
        id(param): [
            torch.zeros(memory.numel(param), device=local_tensor(param).device) for _ in range(criterion.states)
        ]
        for param in params
    }

    def take(param: Tensor) -> None:
        dense, param.grad = param.grad, None
        if dense is None:
            return
        gradient = local_tensor(dense)
        if (reduction := reductions.get(id(param))) is not None:
            gradient = reduction.unrounded(gradient)
        criterion.add(states[id(param)], gradient.reshape(-1).float(), memory.dense(param).float())

    with contextlib.ExitStack() as stack:
        for reduction in dict.fromkeys(reductions.values()):
            stack.enter_context(reduction.dense())
        for param in params:
            stack.callback(param.register_post_accumulate_grad_hook(take).remove)
        with torch.enable_grad():
            for _ in backwards(criterion.batches):
                pass
    with together():
        for key, matrix in first.items():
            if not all(state.isfinite().all() for state in states[key]):
                raise UserError(f"{matrix.name}: a gradient is not finite, so that weights cannot be selected by it")
    shadows: dict[int, nn.Parameter] = {}
    for param in params:
        statistic = criterion.statistic(states.pop(id(param)) if trained is None else states[id(param)])
        if trained is not None:
            positions, movement = trained[id(param)]
            statistic[positions] = -movement.abs()
        shadows[id(param)] = _like(param, statistic)
    found = [
        dataclasses.replace(
            matrix, place=dataclasses.replace(matrix.place, param=shadows[id(matrix.param)]), dtype=torch.float32
        )
        for matrix in matrices
    ]
    return found, states


def _like(param: nn.Parameter, local: Tensor) -> nn.Parameter:
    """A parameter that is sharded as ``param`` is, with ``local`` as this rank's part."""
    begin, end = rows_of(param)
    local = local.view(end - begin, *param.shape[1:])
    if isinstance(param, DTensor):
        mesh, placements = param.device_mesh, param.placements
        made = DTensor.from_local(local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())
        return nn.Parameter(made, requires_grad=False)
    return nn.Parameter(local, requires_grad=False)
