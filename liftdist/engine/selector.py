"""Which weights of a model's matrices are trained: chosen by a criterion and a budget, and chosen anew at each refresh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from liftdist.distributed.collectives import Group, together
from liftdist.engine import selection
from liftdist.engine.gathered import Backwards, Gathered, Movements, gather
from liftdist.engine.matrices import Matrix
from liftdist.engine.reductions import FSDPReduction
from liftdist.engine.scores import Scored
from liftdist.engine.selection import Budget, Criterion, Excluded
from liftdist.errors import UserError

#: The loss where a factor, a function of the name of a matrix, scales what each matrix has learned. Collective.
LossOf = Callable[[Callable[[str], float]], float]


IMPORTANCE, REFRESHES = "importance.", "refreshes"  # among the scalar states: the first of a layer


def is_of_selector(key: str) -> bool:
    """Whether a scalar state is one of :meth:`Selector.scalars`."""
    return key == REFRESHES or key.startswith(IMPORTANCE)


class Selector:
    """The rules of a selection, and how often it has been made.

    Args:
        excluded: weights that are never selected.
        progress: called with the number of matrices selected and their total.
        backwards: for a criterion by gradients.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        criterion: Criterion,
        budget: Budget,
        excluded: Excluded | None = None,
        progress: Callable[[int, int], None] | None = None,
        backwards: Backwards | None = None,
    ) -> None:
        self._matrices = matrices
        selection.check(criterion, {matrix.name: matrix.place for matrix in matrices})
        self.criterion, self.budget, self.excluded = criterion, budget, excluded
        self._progress, self.backwards = progress, backwards
        self.num_excluded = [0] * len(matrices)
        if excluded is not None:
            with together():  # what is excluded may come from files
                self.num_excluded = [excluded(matrix).numel() for matrix in matrices]
        self.is_gathering = False  # gradients for a selection, which are not to be trained with
        self.gathered: dict[
            int, list[Tensor]
        ] = {}  # what a criterion that replaces has gathered, by id of the parameter
        self.importance: dict[str, float] = {}  # what a budget has learned, which is part of a checkpoint
        self.refreshes = 0  # how many times the weights have been selected before
        self.allotted = self._allot()  # weights of each matrix to select, as the budget says

    @property
    def is_known(self) -> bool:
        """Whether the same number of weights of a matrix is selected each time, as the budget alone says."""
        return not (self._compares or self._redraws or selection.decides_number(self.criterion))

    def scalars(self) -> dict[str, float]:
        """What the next selection depends on besides the weights, equal on all ranks."""
        return {REFRESHES: self.refreshes} | {f"{IMPORTANCE}{layer}": value for layer, value in self.importance.items()}

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Take :meth:`scalars`, which may be among others."""
        self.refreshes = int(scalars.get(REFRESHES, 0))
        self.importance = {
            key.removeprefix(IMPORTANCE): value for key, value in scalars.items() if key.startswith(IMPORTANCE)
        }

    @contextlib.contextmanager
    def advanced(self, number: int | None, loss_of: LossOf) -> Iterator[None]:
        """Go on to the next refresh, or to the one with this number, counted from 1; back if the block fails or is stopped.

        Args:
            loss_of: for a budget that learns.
        """
        before = self.refreshes, self.importance, self.allotted
        try:
            self.refreshes = self.refreshes + 1 if number is None else number
            if self._learns:
                shapes = {matrix.name: matrix.shape for matrix in self._matrices}
                self.importance = self.budget.learn(self.importance, shapes, self.refreshes, loss_of)  # type: ignore[attr-defined]
            self.allotted = self._allot()
            yield
        except BaseException:
            self.refreshes, self.importance, self.allotted = before
            raise

    def select(
        self,
        shard_group: Group,
        replicate_group: Group,
        reductions: Mapping[int, FSDPReduction],
        on_selected: Callable[[str, Tensor], None] | None = None,
        trained: Movements | None = None,
    ) -> list[Tensor]:
        """Indices by the current weights, ``[k_local]`` int32 for each matrix. Collective.

        Args:
            reductions: how the gradient of each parameter is reduced, by its ``id``.
            on_selected: see :func:`liftdist.engine.selection.select`.
            trained: what is trained now, for a criterion that replaces some of it.
        """
        shared = shard_group, replicate_group, self._progress, self.excluded
        counts, matrices = self.allotted, self._matrices
        if isinstance(self.criterion, Gathered):
            matrices, self.gathered = self._gather(self.criterion, reductions, trained)
        if self._compares:
            if not (isinstance(self.criterion, Scored) and self.criterion.are_magnitudes):
                raise UserError(
                    f"{self.budget} compares matrices, but the scores of {self.criterion} are no magnitudes"
                )
            if hasattr(self.budget, "divide"):
                counts = self.budget.divide(
                    counts, *selection.sums_of_scores(matrices, counts, self.criterion, *shared)
                )
            else:
                counts = selection.compare(matrices, counts, self.criterion, *shared)
        return selection.select(matrices, counts, self.criterion, *shared, self.refreshes, on_selected)

    @property
    def replaces(self) -> bool:
        """See :attr:`liftdist.engine.gathered.Gathered.replaces`."""
        return bool(getattr(self.criterion, "replaces", False))

    def _gather(
        self, criterion: Gathered, reductions: Mapping[int, FSDPReduction], trained: Movements | None
    ) -> tuple[list[Matrix], dict[int, list[Tensor]]]:
        """The matrices with the statistic of the criterion in place of their weights; what it has gathered. Collective."""
        if self.backwards is None:
            raise ValueError(f"{criterion} needs gradients: pass backwards")
        self.is_gathering = True
        try:
            return gather(criterion, self._matrices, reductions, self.backwards, trained)
        finally:
            self.is_gathering = False

    def _allot(self) -> list[int]:
        shapes = {matrix.name: matrix.shape for matrix in self._matrices}
        redrawn: tuple[Any, ...] = (self.refreshes,) if self._redraws else ()
        if self._learns:
            redrawn = *redrawn, self.importance
        allotted = self.budget.allot(shapes, *redrawn)
        room = [matrix.numel - number for matrix, number in zip(self._matrices, self.num_excluded, strict=True)]
        counts = [allotted[matrix.name] for matrix in self._matrices]
        return counts if self._compares else [min(pair) for pair in zip(counts, room, strict=True)]

    @property
    def _redraws(self) -> bool:
        return bool(getattr(self.budget, "redraws", False))

    @property
    def _compares(self) -> bool:
        return bool(getattr(self.budget, "compares", False))

    @property
    def _learns(self) -> bool:
        return hasattr(self.budget, "learn")
