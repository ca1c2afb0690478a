"""FlexSwitch's choice of sparsity and bit width for each matrix (Gao et al. 2026, arXiv 2604.28109), within a budget of bytes.

    minimise  sum_m ||tau_m - q(tau_m; alpha_m, b_m)||_2^2        subject to  sum_m bytes(m, alpha_m, b_m) <= budget
    alpha_m in ALPHAS, b_m in {1, 2, 4, 8}, or nothing of m at all

``q`` keeps the largest ``1 - alpha`` of the positive and of the negative entries and quantises them uniformly to a sign and
``b - 1`` bits, with the scale of least error. Each choice is coded, and its bytes and its error are those that the file will
have. On the lower convex hull of each matrix's choices, steps are taken in the order of error saved a byte (Shoham and Gersho
1988): up to the first that does not fit, no choice on the hulls has less error in as many bytes. Smaller ones fill the rest.
Equal matrices, as of a tied head that is stored too, have one choice.

Deviations: the paper learns thresholds, bit widths and scales by gradient descent on the loss of some hundred examples a task,
with soft gates. This needs the delta alone, takes the squared error of the weights in place of that loss, and searches a grid.
The paper stores groups of coordinates, this what DEFLATE makes of the gaps between them. Parts and bit widths of the paper are
those that public summaries name.
"""

from __future__ import annotations

import itertools

from liftdist import safetensors_io
from liftdist.deltas import compressed
from liftdist.deltas.codec import encode
from liftdist.deltas.compressions import Changes, Coding
from liftdist.deltas.compressions.t_switch import quantised
from liftdist.deltas.delta import Change
from liftdist.deltas.difference import Difference, squared_error
from liftdist.errors import UserError

ALPHAS, WIDTHS = (0.0, 0.25, 0.5, 0.75, 0.9), (1, 2, 4, 8)
HEADER = 2000  # bytes of a file that holds nothing
Choice = tuple[float, int] | None  # alpha and bits of a matrix, or that nothing of it is kept
Point = tuple[int, float, Choice]  # bytes, squared error, what has them


def plan(changes: Changes, *, budget: float) -> Coding:
    if not 0 < budget <= 1:
        raise UserError(f"--budget {budget:g}: must be above 0, and at most 1")
    sums: dict[str, list[Point]] = {}  # by change, so that copies of a tensor, as of a tied head, stay equal
    kinds, before = {}, 0
    for name, change in changes():
        assert change.base is not None
        parts = {"indices": change.indices, "values": change.values, "base": change.base}
        kinds[name] = kind = safetensors_io.digest_of(parts.items())
        own = points(name, change)
        known = sums.get(kind, [(0, 0.0, choice) for *_, choice in own])
        sums[kind] = [(a + c, b + d, choice) for (a, b, choice), (c, d, _) in zip(known, own, strict=True)]
        before += encode(change.indices).numel() + change.values.nbytes + change.base.nbytes
    hulls = {kind: hull(found) for kind, found in sums.items()}
    chosen = choose(hulls, int(budget * before) - HEADER)
    if hulls and not any(chosen.values()):
        raise UserError(
            f"--budget {budget:g}: {int(budget * before)} bytes hold nothing of the delta; give a larger share"
        )
    return lambda name, change: _coded(change, chosen[kinds[name]])


def points(name: str, change: Change) -> list[Point]:
    """Bytes and squared error of every choice."""
    found: list[Point] = []
    for choice in (None, *itertools.product(ALPHAS, WIDTHS)):
        coded, scale = _coded(change, choice)
        size = compressed.size(*compressed.pack(name, coded, scale)) if choice else 0
        found.append((size, squared_error(change, coded), choice))
    return found


def hull(found: list[Point]) -> list[Point]:
    """The points of the lower convex hull by bytes, up to that of least error: errors fall, and ever less a byte."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda point: point[:2]):
        if kept and point[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and _saved(kept[-2], kept[-1]) <= _saved(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def choose(hulls: dict[str, list[Point]], budget: int) -> dict[str, Choice]:
    """A choice of each hull's, together within the budget."""
    steps = [
        (_saved(before, after), name, number)
        for name, found in hulls.items()
        for number, (before, after) in enumerate(itertools.pairwise(found), 1)
    ]
    at, left, ended = dict.fromkeys(hulls, 0), budget, set()
    for _, name, number in sorted(steps, key=lambda step: (-step[0], step[1:])):
        cost = hulls[name][number][0] - hulls[name][number - 1][0]
        if cost > left or name in ended:
            ended.add(name)  # what follows starts from there
            continue
        at[name], left = number, left - cost
    return {name: hulls[name][number][2] for name, number in at.items()}


def _saved(before: Point, after: Point) -> float:
    """Squared error saved a byte."""
    return (before[1] - after[1]) / max(after[0] - before[0], 1)


def _coded(change: Change, choice: Choice) -> tuple[Difference, float]:
    if choice is not None:
        return quantised(change, *choice)
    coded, scale = quantised(change, 0.0, 1)
    return coded.part(slice(0)), scale
