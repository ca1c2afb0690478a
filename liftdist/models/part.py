"""Where a matrix is in a tensor that holds several."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Where a matrix is in a tensor of the checkpoint: the flat index of its first entry, and the distances between entries."""

    offset: int
    row: int
    column: int

    def is_whole(self, columns: int) -> bool:
        """Whether a matrix of ``columns`` has the indices that it has in the tensor: it is the tensor, or its first rows."""
        return self == (0, columns, 1)

    def indices(self, indices: Tensor, columns: int) -> Tensor:
        """Flat indices in the tensor of flat ``indices [k]`` in the matrix, int64."""
        rows = indices.long() // columns
        return self.offset + rows * self.row + (indices - rows * columns) * self.column

    def inside(self, indices: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The inverse, for a matrix ``[rows, columns]``: which of sorted ``indices [k]`` are in it, and theirs, ascending."""
        places = indices.long() - self.offset
        outer, inner = max(self.row, self.column), min(self.row, self.column)
        far = places.div(outer, rounding_mode="floor")
        near = (places - far * outer) // inner
        row, column = (far, near) if self.row == outer else (near, far)
        fits = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        found = (fits & ((places - far * outer) % inner == 0)).nonzero().squeeze(1)
        flat = (row * columns + column)[found]
        if self.row < self.column:
            flat, order = flat.sort()
            found = found[order]
        return found, flat
