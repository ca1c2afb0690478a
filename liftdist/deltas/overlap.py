"""How far the deltas that are to be merged change the same weights, and whether they agree there.

common      share of a delta's weights that another one changes, too
opposite    share of these that another one moves the other way
norm        ||D_i||, the Frobenius norm of its differences to the base model; norm there: at the common weights alone
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from liftdist.deltas.delta import Delta
from liftdist.deltas.merge import aligned, names, title
from liftdist.models.weights import ModelFolder


def lines(deltas: Sequence[Delta], base: ModelFolder | None = None) -> list[str]:
    """A table with a line for each delta; figures of the rule's input, not of what it keeps. Raises ``UserError`` as
    :func:`liftdist.deltas.merge.merged`."""
    counts = torch.zeros(len(deltas), 3, dtype=torch.int64)  # changed, common, opposite
    squares = torch.zeros(len(deltas), 2, dtype=torch.float64)  # of all, of common ones
    for name in names(deltas):
        differences = aligned(name, deltas, base).differences
        changed, up, down = differences != 0, (differences > 0).any(0), (differences < 0).any(0)
        common = changed & (changed.sum(0) > 1)
        counts += torch.stack([changed.sum(1), common.sum(1), (common & up & down).sum(1)], dim=1)
        squares += torch.stack([(differences**2).sum(1), (differences**2 * common).sum(1)], dim=1)
    width = max(len(title(delta)) for delta in deltas)
    found = [f"{'':{width}}  {'weights':>13}  {'norm':>9}  {'common':>7}  {'opposite':>8}  {'norm there':>10}"]
    for delta, (changed, common, opposite), (norm, there) in zip(
        deltas, counts.tolist(), squares.sqrt().tolist(), strict=True
    ):
        found.append(
            f"{title(delta):{width}}  {changed:>13,}  {norm:>9.4g}  {_share(common, changed)}  "
            f"{_share(opposite, common):>8}  {there:>10.4g}"
        )
    return found


def _share(part: int, whole: int) -> str:
    return f"{part / whole:>7.2%}" if whole else f"{'-':>7}"
