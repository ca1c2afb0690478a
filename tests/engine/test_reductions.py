"""Gradients under FSDP2 on two ranks: exchanged sparsely, never rounded after the reduction, never alive for long."""

import itertools

import pytest
import ranks
import torch
from plain_models import loss_of, make, mlp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bench.traffic import Traffic


class Deep(nn.Module):
    """Eight layers of one 2000 x 2000 matrix."""

    def __init__(self, layers=8, width=2000):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, inputs):
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def most_alive(work, nbytes):
    """The most allocations of exactly ``nbytes`` that were alive at once during ``work()``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [
        e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and abs(e.nbytes()) == nbytes
    ]
    counts = itertools.accumulate(e.nbytes() // nbytes for e in sorted(events, key=lambda e: e.start_ns()))
    return max(counts, default=0)


def on_two_ranks(mesh):
    return dict(
        bf16=unrounded_gradient(mesh),
        together=unrounded_gradient(mesh, together=True),
        averaged=averages(mesh),
        sparse=sparse_and_dense(mesh),
        memory=memory_of_a_step(mesh),
        mixed=mixed_layouts(mesh),
        again=again(mesh),
    )


def again(mesh):
    """The gradient of a second set of principal weights, after the first was dropped, and of the same set as the first."""
    found = []
    for sparse, before in itertools.product((True, False), (None, True, False)):
        model = mlp(torch.bfloat16)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh.shard_mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        if before is not None:
            principal = make(model, density=0.05, filter_rank=1, sparse_reduce_scatter=before)
            del principal
        principal = make(model, sparse_reduce_scatter=sparse)
        loss_of(model, mesh.rank).backward()
        found.append(principal.values.grad.clone())
    return found


def mixed_layouts(mesh):
    model = mlp()
    fully_shard(model[2], mesh=mesh.shard_mesh)
    try:
        make(model)
    except ValueError as error:
        return str(error)
    return ""


def unrounded_gradient(mesh, together=False):
    """A bf16 model under FSDP2: the flat gradient is the float32 sum of what the ranks computed, not its bf16 rounding."""
    model, alone = mlp(torch.bfloat16), mlp(torch.bfloat16)
    for layer in ([model[0], model[2]], model) if together else (model[0], model[2], model):
        fully_shard(layer, mesh=mesh.shard_mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    others = []
    model[2].set_all_reduce_hook(others.append)
    principal = make(model)
    loss_of(model, mesh.rank).backward()
    expected = [torch.zeros(50, 30), torch.zeros(7, 50)]
    for rank in range(2):
        alone.zero_grad()
        loss_of(alone, rank).backward()
        expected[0] += alone[0].weight.grad.float() / 2
        expected[1] += alone[2].weight.grad.float() / 2
    found, start = [], 0
    for matrix, indices, whole in zip(principal.matrices, principal.indices, expected, strict=True):
        grad = principal.values.grad[start : start + len(indices)]
        found.append(torch.equal(grad, whole.flatten()[indices.long() + matrix.offset_local]))
        start += len(indices)
    rounded = torch.equal(principal.values.grad, principal.values.grad.bfloat16().float())
    held = [p.reduction.reduced for p in principal.parts if p.reduction.reduced is not None]
    left = [p.grad is not None for p in model.parameters()]
    return dict(exact=found, rounded=rounded, held=len(held), left=left, others=len(others))


class Skips(nn.Module):
    """Two layers, the second of which is left out on demand."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 65, bias=False), nn.Linear(65, 64)

    def forward(self, inputs, skip):
        inputs = torch.tanh(self.first(inputs))
        return inputs if skip else self.second(inputs)


def sparse_and_dense(mesh):
    """Of both exchanges: the flat gradient of two micro-batches, the bytes reduced, the gradient after a refresh, and how many
    copies of all gradients there were in float32."""
    found = {}
    for skip, sparse in itertools.product((False, True), (False, True)):
        torch.manual_seed(1)
        model = Skips().to(torch.bfloat16)
        fully_shard(model, mesh=mesh.shard_mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        principal = make(model, density=0.05, sparse_reduce_scatter=sparse)
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(mesh.rank)).to(torch.bfloat16)
        traffic = Traffic()
        with traffic:
            for micro in range(2):
                model(inputs + micro, skip and micro == 0).float().square().mean().backward()
        grad, before = principal.values.grad.clone(), [indices.clone() for indices in principal.indices]
        group = mesh.shard_mesh.get_group().group_name
        reduced = sum(count[1] for name, count in traffic.by_group[group].items() if "reduce_scatter" in name)
        with torch.no_grad():
            for matrix in principal.matrices:
                matrix.rows_local.copy_(matrix.rows_local.flip(1))
        principal.refresh()
        principal.drop_gradients()
        assert not all(map(torch.equal, before, principal.indices))
        loss = model(inputs, False).float().square().mean()
        unit = principal.parts[0].reduction
        in_float32 = most_alive(lambda loss=loss: loss.backward(), unit._shards * unit._row * 4)
        found[skip, sparse] = grad, reduced, principal.values.grad.clone(), in_float32
    return found


def averages(mesh):
    """Unsharded replicas in a plain loop: ``reduce_gradients`` averages as data parallelism does."""
    model, alone = mlp(), mlp()
    principal, reference = make(model), None
    loss_of(model, mesh.rank).backward()
    principal.reduce_gradients()
    reference = make(alone, replicate_group=torch.distributed.new_group([mesh.rank], use_local_synchronization=True))
    for rank in range(2):
        (loss_of(alone, rank) / 2).backward()
    return torch.allclose(principal.values.grad, reference.values.grad, atol=1e-7)


def memory_of_a_step(mesh):
    def sharded():
        torch.manual_seed(0)
        model = Deep()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh.shard_mesh)
        return fully_shard(model, mesh=mesh.shard_mesh)

    def loss(model):
        return model(torch.randn(4, 2000)).square().mean()

    shard_bytes = 1000 * 2000 * 4  # of one layer's gradient on one rank
    dense = sharded()
    for _ in range(2):
        dense.zero_grad()
        dense_loss = loss(dense)
        without_hooks = most_alive(lambda dense_loss=dense_loss: dense_loss.backward(), shard_bytes)
    model = sharded()
    principal = make(model, density=0.05, criterion=lambda weight, count, seed: torch.arange(0, 20 * count, 20))
    optimizer = torch.optim.AdamW([principal.values], lr=1e-4, fused=True)
    for _ in range(2):
        step_loss = loss(model)
        with_hooks = most_alive(lambda step_loss=step_loss: step_loss.backward(), shard_bytes)
        principal.reduce_gradients()
        optimizer.step()
        principal.write_back()
    state = optimizer.state[principal.values]
    held = [principal.values, principal.values.grad, state["exp_avg"], state["exp_avg_sq"], *principal.indices]
    return dict(
        without_hooks=without_hooks,
        with_hooks=with_hooks,
        principal_bytes=sum(t.numel() * t.element_size() for t in held),
        parameters=sum(p.numel() for p in model.parameters()),
    )


@pytest.fixture(scope="module")
def two_ranks():
    return ranks.run(2, on_two_ranks)


def test_the_gradient_is_never_rounded_after_the_reduction(two_ranks):
    for rank in two_ranks:
        for way in ("bf16", "together"):  # modules sharded one by one, and in one group
            assert all(rank[way]["exact"])
            assert not rank[way]["rounded"]
            assert rank[way]["held"] == 0
            assert not any(rank[way]["left"])
            assert rank[way]["others"] == 1  # a hook that was there before is still called


def test_the_sparse_exchange_sums_as_the_dense_one_does(two_ranks):
    for rank in two_ranks:
        for skip in (False, True):  # with a parameter that takes no part in one of two backwards, too
            (grad, reduced, later, copies), (sparse, sparse_reduced, sparse_later, sparse_copies) = (
                rank["sparse"][skip, sparse] for sparse in (False, True)
            )
            assert torch.equal(grad, sparse)
            assert torch.equal(later, sparse_later)
            assert (grad != 0).double().mean() > 0.95
            assert (later != 0).double().mean() > 0.95
            assert sparse_reduced < (0.5 if skip else 0.08) * reduced
            assert copies >= 1
            assert sparse_copies == 0


def test_principal_weights_that_were_dropped_leave_nothing_behind(two_ranks):
    for rank in two_ranks:
        assert all(torch.equal(rank["again"][0], grad) for grad in rank["again"])
        assert rank["again"][0].any()


def test_matrices_must_be_sharded_alike(two_ranks):
    for rank in two_ranks:
        assert "all trained matrices must be sharded alike: 0.weight is not sharded, 2.weight is" in rank["mixed"]


def test_replicas_average_in_a_plain_loop(two_ranks):
    assert all(rank["averaged"] for rank in two_ranks)


def test_no_dense_gradient_outlives_its_layer(two_ranks):
    """Of eight layers, the gradient of one is alive at a time; without the hooks all eight are at the end."""
    for rank in two_ranks:
        assert rank["memory"]["without_hooks"] == 8
        assert rank["memory"]["with_hooks"] == 1


def test_principal_state_is_small(two_ranks):
    total = sum(rank["memory"]["principal_bytes"] for rank in two_ranks)
    assert 0.95 < total / two_ranks[0]["memory"]["parameters"] <= 1.05
