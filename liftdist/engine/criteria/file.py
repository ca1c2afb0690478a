"""The weights that a file names: those of a delta, of another run, or of a selection that was kept.

S = the indices that the file holds for the matrix

Their number is that of the file, and a refresh would change nothing: there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from liftdist.engine.matrices import Matrix


@dataclass(frozen=True)
class File:
    """
    Args:
        named: ``[k]`` int64 sorted flat indices into the whole of a matrix; for the key of a kept selection it has ``digest``.
    """

    named: Callable[[Matrix], Tensor]
    decides_number: ClassVar[bool] = True
    stays: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """In place of a budget: nothing is known before the file is read."""
        return dict.fromkeys(shapes, 0)

    def of(self, matrix: Matrix, refreshes: int) -> Callable[..., Tensor]:
        """The criterion of one matrix, whatever its weights are."""
        return lambda weight, *_: self.named(matrix).to(weight.device)


def make(settings: Any) -> File:
    """From the setting ``file``, which names the weights when it has been opened, see :mod:`liftdist.methods.named`."""
    return File(settings.file)
