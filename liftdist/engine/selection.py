"""Which rank factors which matrix, and how every rank gets the indices of its own rows.

    1. assign    each matrix gets an owner: the most expensive first, each to the least loaded rank
    2. gather    in rounds: every owner receives the rows of its next matrix from the shards of its replica
    3. select    the owner scores the whole matrix with the same code as a single process would
    4. return    the owner cuts the sorted indices at the row boundaries and sends each shard its own
    5. share     replicas exchange the indices that their owners selected

A rank holds at most two whole matrices, the one being factored and the next, and the rows it sends; quantised rows are sent as
they are kept. Independent of how entries are scored: the criterion is a function.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from liftdist.distributed.collectives import Group, all_reduce_sum, together
from liftdist.engine.apportion import apportion
from liftdist.engine.matrices import Matrix, Place
from liftdist.engine.scores import BUCKETS, Scored, Scores, histogram
from liftdist.engine.topk import blocks
from liftdist.errors import UserError


class Criterion(Protocol):
    """Which entries of a weight matrix are trained. In your own loop a plain function will do.

    Optional members are ``cost(m, n)``, the relative time for a matrix, ``m n`` by default, and
    ``workspace(m, n, num_selected)``, the bytes needed besides the matrix, 16 per weight by default, which the planner counts.
    With a member ``decides_number`` that is true the result may have any length, and ``num_selected`` means nothing. With one
    ``stays`` that is true a refresh would select the same again, and a run leaves it out.

    A criterion that differs between matrices, or from one selection to the next, has ``of(matrix, refreshes)``, which returns
    that of a matrix, and need not be callable itself; ``refreshes`` is 0 at the first selection, 1 at the first refresh. One that
    cannot select in every matrix has ``check(places)``, see :func:`check`.

    A criterion that is chosen in a config is a frozen dataclass: its fields are part of the key of a cached selection.
    """

    def __call__(self, weight: Tensor, num_selected: int, seed: int, /) -> Tensor:
        """``weight [m, n] -> [num_selected]`` int64 sorted flat indices."""


class Budget(Protocol):
    """How many weights of each matrix are trained."""

    def allot(self, shapes: Mapping[str, tuple[int, int]], /) -> Mapping[str, int]:
        """Number of weights to train of each matrix, from the shapes of all trained matrices; both by name.

        With a member ``compares`` that is true the sum is divided anew by the scores: by :func:`compare`, or by its ``divide``,
        which is given these numbers and what :func:`sums_of_scores` finds, by matrix in the model's order, and returns how many
        to train of each. With one ``redraws`` that is true it differs from one selection to the next, and is given how many there
        were before. One that also has ``learn`` is given what that has returned last, see :mod:`liftdist.engine.budgets.ist`.
        """


#: ``[e]`` int64 sorted flat indices, in the whole of a matrix, of its weights that must not be selected.
Excluded = Callable[[Matrix], Tensor]


def check(criterion: Criterion, places: Mapping[str, Place]) -> None:
    """Raises ``UserError`` if ``criterion`` cannot select in the matrices at ``places``, by name."""
    if hasattr(criterion, "check"):
        criterion.check(places)


def decides_number(criterion: Criterion) -> bool:
    """Whether the criterion itself says how many weights of a matrix are trained."""
    return bool(getattr(criterion, "decides_number", False))


def workspace_of(criterion: Criterion, m: int, n: int, num_selected: int) -> int:
    """Bytes that ``criterion`` needs besides an ``[m, n]`` weight."""
    workspace: Callable[[int, int, int], int] = getattr(criterion, "workspace", lambda m, n, _: 16 * m * n)
    return workspace(m, n, num_selected)


def cost_of(criterion: Criterion, m: int, n: int) -> float:
    """Relative time that ``criterion`` takes for an ``[m, n]`` matrix."""
    cost: Callable[[int, int], float] = getattr(criterion, "cost", lambda m, n: float(m * n))
    return cost(m, n)


def assign_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Owner of each item: the most expensive first, each to the least loaded rank (longest processing time first)."""
    loads, owners = [(0.0, rank) for rank in range(num_ranks)], [0] * len(costs)  # a heap
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[item] = loads[0]
        heapq.heapreplace(loads, (load + costs[item], owners[item]))
    return owners


def seed_of(name: str) -> int:
    """The seed for a parameter: the same in every run, on every rank and world size."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def select(
    matrices: Sequence[Matrix],
    counts: Sequence[int],
    criterion: Criterion,
    shard_group: Group = None,
    replicate_group: Group = None,
    progress: Callable[[int, int], None] | None = None,
    excluded: Excluded | None = None,
    refreshes: int = 0,
    on_selected: Callable[[str, Tensor], None] | None = None,
) -> list[Tensor]:
    """Select the principal weights of all ``matrices``. Collective over both groups.

    Args:
        counts: number of weights to select of each.
        shard_group: the ranks that hold the rows of one replica.
        replicate_group: the ranks that hold the same rows of other replicas.
        progress: called on every rank with the number of matrices done and their total.
        excluded: the weights that must not be selected; ``counts`` leave room for them.
        refreshes: how many times the weights have been selected before.
        on_selected: called on the owner of a matrix with its name and whole selection.

    Returns:
        For each matrix, ``[k_local]`` int32 sorted flat indices within this rank's rows.

    Raises:
        UserError: on every rank, naming a parameter that is not finite or for which the criterion's result is invalid.
    """
    found: dict[int, Tensor] = {}
    made = [torch.empty(0, dtype=torch.int64)]  # by this rank in the current round

    def score(item: int, whole: Tensor) -> None:
        made[0] = _score(matrices[item], counts[item], whole, criterion, excluded, refreshes)
        if on_selected is not None:
            on_selected(matrices[item].name, made[0])

    def give_back(assigned: Sequence[int | None], mine: int | None) -> None:
        returned = _return_indices(matrices, mine, made[0], shard_group)
        made[0] = torch.empty(0, dtype=torch.int64)
        found.update({item: local for item, local in zip(assigned, returned, strict=True) if item is not None})

    costs = [cost_of(criterion, *matrix.shape) for matrix in matrices]
    owners = _visit(matrices, costs, score, shard_group, replicate_group, progress, give_back)
    if replicate_group is not None:
        shards, replica = _size_and_rank(shard_group)[0], replicate_group.rank()
        _share(matrices, [owner // shards for owner in owners], found, replica, replicate_group)
    return [found[i] for i in range(len(matrices))]


def compare(
    matrices: Sequence[Matrix],
    counts: Sequence[int],
    criterion: Scored,
    shard_group: Group = None,
    replicate_group: Group = None,
    progress: Callable[[int, int], None] | None = None,
    excluded: Excluded | None = None,
) -> list[int]:
    """Divide the sum of ``counts`` among the matrices by one threshold of their scores, each in units of its root mean square.

    Arguments and errors are those of :func:`select`, but ``counts`` need not leave room for what is excluded: their sum is cut to
    the weights that are not. Collective over both groups.
    """
    found: dict[int, Tensor] = {}

    def count(item: int, scores_of: Scores) -> None:
        found[item] = histogram(scores_of, matrices[item].shape)

    _visit_scores(matrices, counts, criterion, shard_group, replicate_group, progress, excluded, count)

    def over_ranks(numbers: Tensor) -> Tensor:
        return all_reduce_sum(numbers.to(matrices[0].device), shard_group, replicate_group).cpu()

    merged = torch.zeros(BUCKETS, dtype=torch.int64)
    for one in found.values():
        merged.index_add_(0, one[:, 0], one[:, 1])
    from_top = over_ranks(merged).flip(0).cumsum(0)  # entries in the highest bucket, in the two highest, ...
    total = min(sum(counts), int(from_top[-1]))
    bucket = BUCKETS - 1 - int(torch.searchsorted(from_top, total))
    table = torch.zeros(len(matrices), 2, dtype=torch.int64)  # entries above the bucket, and in it
    for item, one in found.items():
        table[item, 0], table[item, 1] = one[one[:, 0] > bucket, 1].sum(), one[one[:, 0] == bucket, 1].sum()
    above, inside = over_ranks(table).T.tolist()
    return [one + more for one, more in zip(above, apportion(total - sum(above), inside, inside), strict=True)]


def sums_of_scores(
    matrices: Sequence[Matrix],
    counts: Sequence[int],
    criterion: Scored,
    shard_group: Group = None,
    replicate_group: Group = None,
    progress: Callable[[int, int], None] | None = None,
    excluded: Excluded | None = None,
) -> tuple[list[float], list[int]]:
    """Of each matrix the sum of its scores, and how many are of weights that may be selected.

    Arguments and errors are those of :func:`compare`. Collective over both groups.
    """
    sums = torch.zeros(2, len(matrices), dtype=torch.float64)

    def add(item: int, scores_of: Scores) -> None:
        for begin, rows in blocks(*matrices[item].shape):
            scores = scores_of(slice(begin, begin + rows))
            sums[0, item] += float(scores.clamp(min=0).double().sum())
            sums[1, item] += int((scores >= 0).sum())

    _visit_scores(matrices, counts, criterion, shard_group, replicate_group, progress, excluded, add)
    total, number = all_reduce_sum(sums.to(matrices[0].device), shard_group, replicate_group)
    return total.tolist(), number.long().tolist()


def _visit_scores(
    matrices: Sequence[Matrix],
    counts: Sequence[int],
    criterion: Scored,
    shard_group: Group,
    replicate_group: Group,
    progress: Callable[[int, int], None] | None,
    excluded: Excluded | None,
    take: Callable[[int, Scores], None],
) -> None:
    """Call ``take`` with the place of each matrix and its scores, -1 for what is excluded, on its owner. Collective."""

    def score(item: int, whole: Tensor) -> None:
        matrix = matrices[item]
        left_out = None if excluded is None else excluded(matrix)
        with criterion.scored(whole, counts[item], seed_of(matrix.name), left_out) as scores_of:
            take(item, scores_of)

    costs = [cost_of(criterion, *matrix.shape) for matrix in matrices]
    _visit(matrices, costs, score, shard_group, replicate_group, progress)


def _visit(
    matrices: Sequence[Matrix],
    costs: Sequence[float],
    work: Callable[[int, Tensor], None],
    shard_group: Group,
    replicate_group: Group,
    progress: Callable[[int, int], None] | None,
    after: Callable[[Sequence[int | None], int | None], None] | None = None,
) -> list[int]:
    """Gather each of ``matrices`` on one rank, its owner, which calls ``work`` with its place and its values. Collective.

    Args:
        costs: relative time of each, by which owners are assigned.
        after: called on all ranks after each round, with the matrix of every rank of this replica, and that of this rank.

    Returns:
        The owner of each matrix: its replica times the shards, plus its shard.
    """
    shards, shard = _size_and_rank(shard_group)
    replicas, replica = _size_and_rank(replicate_group)
    owners = assign_owners(costs, replicas * shards)
    rounds = _rounds(costs, owners, replicas * shards)
    failure: Exception | None = None
    first = replica * shards
    wait_for_matrix = _start_gather(matrices, rounds[0][first : first + shards], shard, shard_group)

    @contextlib.contextmanager
    def carried_on(item: int | None) -> Iterator[None]:
        """Keep up the collectives for the other ranks, and raise at the end."""
        nonlocal failure
        try:
            yield
        except ValueError as error:
            failure = failure or (error if item is None else UserError(f"{matrices[item].name}: {error}"))
        except Exception as error:
            failure = failure or error

    for number, items in enumerate(rounds):
        assigned = items[first : first + shards]
        mine, arrived, whole = assigned[shard], wait_for_matrix(), None
        with carried_on(mine):
            whole = arrived()
        del arrived
        if number + 1 < len(rounds):  # the next matrices are gathered while these are factored
            wait_for_matrix = _start_gather(matrices, rounds[number + 1][first : first + shards], shard, shard_group)
        if mine is not None and whole is not None and failure is None:
            with carried_on(mine):
                work(mine, whole)
        del whole
        if after is not None:
            after(assigned, mine)
        if progress is not None:
            progress(sum(item is not None for earlier in rounds[: number + 1] for item in earlier), len(matrices))
    with together():
        if failure is not None:
            raise failure
    return owners


def _size_and_rank(group: Group) -> tuple[int, int]:
    return (1, 0) if group is None else (group.size(), group.rank())


def _rounds(costs: Sequence[float], owners: Sequence[int], ranks: int) -> list[list[int | None]]:
    """For each round, the matrix of every rank or None: the most expensive first, so that a round has similar costs."""
    queues: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        queues[owners[item]].append(item)
    return [list(items) for items in itertools.zip_longest(*queues)]


def _score(
    matrix: Matrix, count: int, whole: Tensor, criterion: Criterion, excluded: Excluded | None, refreshes: int
) -> Tensor:
    """The criterion's selection of ``whole``, validated, because the criterion may be user code."""
    if not torch.isfinite(whole.sum(dtype=torch.float32)):
        raise ValueError("weight holds NaN or infinity")
    rule = criterion.of(matrix, refreshes) if hasattr(criterion, "of") else criterion
    left_out = torch.empty(0, dtype=torch.int64) if excluded is None else excluded(matrix)
    seed = seed_of(matrix.name)
    if left_out.numel() and isinstance(rule, Scored):
        indices = rule(whole, count, seed, left_out)
    elif left_out.numel() and decides_number(criterion):
        indices = rule(whole, count, seed)
        indices = indices[~torch.isin(indices, left_out.to(indices.device), assume_unique=True)]
    elif left_out.numel():
        raise ValueError("only a criterion with scores, or one that decides the number, can leave weights out")
    else:
        indices = rule(whole, count, seed)
    expected = indices.shape if decides_number(criterion) else (count,)
    if indices.dtype != torch.int64 or indices.ndim != 1 or indices.shape != expected:
        raise ValueError(f"the criterion must return [{count}] int64, got {list(indices.shape)} {indices.dtype}")
    if not ascending_within(indices, whole.numel()):
        raise ValueError(f"the criterion must return ascending flat indices below {whole.numel()}")
    return indices.to(whole.device)


def ascending_within(indices: Tensor, size: int) -> bool:
    if not indices.numel():
        return True
    return bool((indices[1:] > indices[:-1]).all()) and int(indices[0]) >= 0 and int(indices[-1]) < size


def _start_gather(
    matrices: Sequence[Matrix], assigned: Sequence[int | None], shard: int, group: Group
) -> Callable[[], Callable[[], Tensor | None]]:
    """Start sending this rank's rows of every assigned matrix to its owner; the result waits for those of the one that this rank
    owns, and returns what makes it of them."""
    mine = assigned[shard]
    if group is None:
        return lambda: lambda: None if mine is None else matrices[mine].rows_local.contiguous()
    device = matrices[0].device
    parts = [torch.empty(0, dtype=torch.uint8) if item is None else matrices[item].sent for item in assigned]
    sent_sizes = [part.numel() for part in parts]
    sent = torch.cat([part.to(device) for part in parts])
    del parts
    received_sizes = [0] * group.size()
    is_packed = any(item is not None and matrices[item].is_packed for item in assigned)
    if is_packed:  # shards have more or less that is exact
        received_sizes = _exchange_sizes(sent_sizes, device, group)
    elif mine is not None:
        bounds, row = matrices[mine].row_bounds, matrices[mine].columns * matrices[mine].dtype.itemsize
        received_sizes = [(bounds[s + 1] - bounds[s]) * row for s in range(group.size())]
    whole = torch.empty(sum(received_sizes), dtype=torch.uint8, device=device)
    work: Any = dist.all_to_all_single(whole, sent, received_sizes, sent_sizes, group=group, async_op=True)

    def wait() -> Callable[[], Tensor | None]:
        nonlocal work, sent, whole
        work.wait()
        arrived, work = whole, None
        sent = whole = torch.empty(0, dtype=torch.uint8)  # both buffers are freed as soon as the matrix is made
        return lambda: None if mine is None else matrices[mine].received(arrived, received_sizes)

    return wait


def _exchange_sizes(sizes: Sequence[int], device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How much each rank will send to this one, of what this one will send to each."""
    sent = torch.tensor(sizes, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.tolist()


def _return_indices(matrices: Sequence[Matrix], mine: int | None, indices: Tensor, group: Group) -> list[Tensor]:
    """This rank's part (int32, local) of each assigned matrix's selection; ``indices`` is that of matrix ``mine``."""
    device = matrices[0].device
    shards = 1 if group is None else group.size()
    parts = [indices.to(torch.int32)] * shards
    if mine is not None:
        bounds = torch.tensor(matrices[mine].row_bounds, device=indices.device) * matrices[mine].columns
        cuts = torch.searchsorted(indices, bounds).tolist()
        parts = [(indices[cuts[s] : cuts[s + 1]] - bounds[s]).to(torch.int32) for s in range(shards)]
    if group is None:
        return parts
    sent_sizes = [part.numel() for part in parts]
    received_sizes = _exchange_sizes(sent_sizes, device, group)
    received = torch.empty(sum(received_sizes), dtype=torch.int32, device=device)
    sent = torch.cat([part.to(device) for part in parts])
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group)
    return [part.clone() for part in received.split(received_sizes)]


def _share(
    matrices: Sequence[Matrix], source: Sequence[int], found: dict[int, Tensor], replica: int, group: dist.ProcessGroup
) -> None:
    """Fill ``found`` with the selections of owners in other replicas; ``source`` is the replica of each matrix's owner."""
    device = matrices[0].device
    sizes = torch.tensor([found[i].numel() if i in found else 0 for i in range(len(matrices))], device=device)
    dist.all_reduce(sizes, group=group)
    for sender in range(group.size()):
        items = [i for i in range(len(matrices)) if source[i] == sender]
        lengths = [int(sizes[i]) for i in items]
        if sender == replica:
            message = torch.cat([found[i] for i in items] or [torch.empty(0, dtype=torch.int32, device=device)])
        else:
            message = torch.empty(sum(lengths), dtype=torch.int32, device=device)
        dist.broadcast(message, group=group, group_src=sender)
        if sender != replica:
            found.update(zip(items, (part.clone() for part in message.split(lengths)), strict=True))
