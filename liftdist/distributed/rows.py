"""How rows are sharded over ranks: like ``torch.chunk``, so that the last ranks may hold fewer rows, or none."""

from __future__ import annotations


def row_bounds(rows: int, shards: int) -> tuple[int, ...]:
    """``[shards + 1]``: shard ``s`` holds rows ``bounds[s]`` to ``bounds[s + 1]``, as ``torch.chunk`` splits them."""
    chunk = -(-rows // shards)
    return tuple(min(rows, chunk * shard) for shard in range(shards + 1))
