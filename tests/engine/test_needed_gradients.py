"""Matrices that nothing is trained of get no gradient: what backward computes and exchanges, on one process and under FSDP2."""

import itertools

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.flop_counter import FlopCounterMode

from bench.traffic import Traffic
from liftdist import PrincipalWeights
from liftdist.engine.budgets.layers import Layers
from liftdist.engine.criteria.gradient import Gradient

WIDTH, ROWS = 24, 8
PRODUCT = 2 * ROWS * WIDTH * WIDTH  # FLOPs of a matrix


def make(dtype=torch.float32):
    """Two modules of three matrices."""
    torch.manual_seed(0)
    layers = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model, rank):
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))
    return model(inputs.to(next(model.parameters()).dtype)).float().square().mean()


def gradients(dtype, world_size):
    """By plain autograd: the mean over the ranks, in float32."""
    model, total = make(dtype), 0.0
    for rank in range(world_size):
        model.zero_grad()
        loss_of(model, rank).backward()
        total = total + torch.stack([param.grad.float() for param in model.parameters()]) / world_size
    return total


class Changing:
    """A tenth of each matrix, and nothing of every third one, which ones differs; at first nothing of the lowest three."""

    redraws = True

    def allot(self, shapes, refreshes=0):
        idle = {0, 1, 2} if refreshes == 0 else {refreshes % 3, refreshes % 3 + 3}
        return {name: 0 if place in idle else round(0.1 * m * n) for place, (name, (m, n)) in enumerate(shapes.items())}


def test_backward_stops_below_the_lowest_trained_layer():
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)))
    principal = PrincipalWeights(model, budget=Layers(layers=1))
    seen = set()
    for _ in range(12):
        trained = [bool(count) for count in principal.counts].index(True)
        seen.add(trained)
        loss = loss_of(model, 0)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert counter.get_total_flops() == PRODUCT * (1 + 5 - trained)
        assert principal.values.grad.abs().sum() > 0
        assert not any(param.grad is not None for param in model.parameters())
        principal.refresh()
    assert len(seen) > 3


def steps(mesh, dtype, sparse, by_gradients):
    """Of three selections: whether gradients are exact, products of the backward, bytes reduced, and what is selected."""
    model = make(dtype)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh.shard_mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))

    def backwards(batches):
        for _ in range(batches):
            loss_of(model, mesh.rank).backward()
            yield

    criterion = dict(criterion=Gradient(batches=1), backwards=backwards) if by_gradients else dict(filter_rank=2)
    principal = PrincipalWeights(model, budget=Changing(), sparse_reduce_scatter=sparse, **criterion)
    wanted, found = gradients(dtype, mesh.world_size), []
    for refreshes in range(4):
        if refreshes:
            principal.refresh()
        with torch.no_grad():
            loss_of(model, mesh.rank)  # leaves the root gathered
        traffic = Traffic()
        loss = loss_of(model, mesh.rank)
        with traffic, FlopCounterMode(display=False) as counter:
            loss.backward()
        exact, chosen = [], []
        for segment, whole in zip(principal._segments, wanted, strict=True):
            rows = segment.indices.long() + segment.matrix.offset_local
            exact.append(torch.equal(principal.values.grad[segment.span], whole.flatten()[rows]))
            chosen.append(rows.tolist())
        moved = traffic.by_group[mesh.shard_mesh.get_group().group_name].items()
        reduced = sum(count[1] for name, count in moved if "reduce_scatter" in name)
        held = [part.reduction.reduced for part in principal.parts if part.reduction.reduced is not None]
        needed = [param.requires_grad for param in model.parameters()]
        found.append((exact, counter.get_total_flops() / PRODUCT, reduced, chosen, len(held), needed))
        principal.drop_gradients()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fsdp_reduces_is_laid_out_without_them(dtype):
    sparse, other = ranks.run(2, steps, dtype, True, False)
    dense = ranks.run(2, steps, dtype, False, False)[0]
    for one, whole in zip(sparse, dense, strict=True):
        assert all(one[0])
        assert all(whole[0])
        assert one[2] < whole[2] / 2
        assert one[4] == whole[4] == 0
    # of the second module three dW and two dX; then dW of four, and dX above the lowest trained
    assert [one[1] for one in sparse] == [3 + 2, 4 + 5, 4 + 5, 4 + 4]
    for place, one in enumerate(sparse):
        counts = Changing().allot(dict.fromkeys(range(6), (WIDTH, WIDTH)), place)
        assert one[5] == [bool(count) for count in counts.values()] == other[place][5]


def test_gradients_of_all_are_gathered_for_a_selection():
    every = ranks.run(2, steps, torch.float32, True, True)
    scores = gradients(torch.float32, 2).square().flatten(1)
    for refreshes in range(4):
        chosen = [
            sorted(itertools.chain(*parts)) for parts in zip(*(found[refreshes][3] for found in every), strict=True)
        ]
        counts = Changing().allot(dict.fromkeys(range(6), (WIDTH, WIDTH)), refreshes)
        for own, count, score in zip(chosen, counts.values(), scores, strict=True):
            assert own == sorted(score.topk(count).indices.tolist())
