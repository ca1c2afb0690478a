"""The engine by itself: plain models, someone else's loop, FSDP2 in bf16."""

import itertools

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bench.traffic import Traffic
from liftdist import PrincipalWeights


def mlp(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7, bias=False)).to(dtype)


def batch(seed, dtype=torch.float32, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 30, generator=generator).to(dtype), torch.randn(size, 7, generator=generator).to(dtype)


def loss_of(model, seed):
    inputs, targets = batch(seed, next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(inputs), targets)


def make(model, **settings):
    return PrincipalWeights(model, **({"density": 0.1, "filter_rank": 4} | settings))


def flat(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def test_the_documented_loop_trains_the_principal_weights_alone():
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    principal = PrincipalWeights(model, density=0.05, filter_rank=4)
    optimizer = torch.optim.AdamW([principal.values], lr=1e-2, weight_decay=0.0, fused=True)
    first = loss_of(model, 0).item()
    for step in range(1, 31):
        if step % 100 == 0:
            principal.refresh(optimizer)
        loss_of(model, 0).backward()
        assert all(p.grad is None for p in model.parameters())
        principal.reduce_gradients()
        principal.clip_grad_norm_(1.0)
        optimizer.step()
        principal.scatter()
    assert loss_of(model, 0).item() < first
    for old, new, count in zip(before, model.parameters(), (75, 0, 18), strict=True):
        assert (old != new).sum() <= count
        assert count == 0 or (old != new).sum() > count / 2
    assert principal.num_selected == 75 + 18  # round(.05 * 1500), round(.05 * 350)


@pytest.mark.parametrize("variant", ["zero_grad", "set_to_none", "model.zero_grad", "nothing"])
def test_any_habit_of_clearing_gradients_gives_the_same_weights(variant):
    def run(variant):
        model = mlp()
        principal = make(model)
        optimizer = torch.optim.AdamW([principal.values], lr=1e-2)
        for step in range(5):
            if variant == "zero_grad":
                optimizer.zero_grad(set_to_none=False)
            if variant == "set_to_none":
                optimizer.zero_grad()
            if variant == "model.zero_grad":
                model.zero_grad()
            for micro in range(2):
                (loss_of(model, 2 * step + micro) / 2).backward()
            principal.reduce_gradients()
            optimizer.step()
            principal.scatter()
        return flat(model)

    expected = run("reference")
    assert torch.equal(run(variant), expected)


def test_gradient_equals_the_dense_one_and_accumulates():
    model, dense = mlp(), mlp()
    principal = make(model)
    for seed in (1, 2):
        loss_of(model, seed).backward()
        loss_of(dense, seed).backward()
    expected = torch.cat(
        [
            param.grad.flatten()[indices.long()]
            for param, indices in zip((dense[0].weight, dense[2].weight), principal.indices, strict=True)
        ]
    )
    assert torch.allclose(principal.values.grad, expected, rtol=1e-6)
    norm = principal.clip_grad_norm_(0.5 * expected.norm())
    assert norm == pytest.approx(expected.norm().item(), rel=1e-6)
    assert principal.values.grad.norm() == pytest.approx(0.5 * expected.norm().item(), rel=1e-4)


def test_float32_values_keep_updates_that_bfloat16_loses():
    """Updates of 1e-5 of a weight vanish in bf16 (8 bits), one by one; the float32 values add them up."""
    lossy, model = mlp(torch.bfloat16), mlp(torch.bfloat16)
    start = flat(model)
    stock = torch.optim.AdamW(lossy.parameters(), lr=1e-6, weight_decay=0.0)
    principal = make(model)
    optimizer = torch.optim.AdamW([principal.values], lr=1e-6, weight_decay=0.0, fused=True)
    for _ in range(2000):
        loss_of(lossy, 0).backward()
        stock.step()
        stock.zero_grad()
        loss_of(model, 0).backward()
        principal.reduce_gradients()
        optimizer.step()
        principal.scatter()
    trained = torch.cat(
        [i.long() + o for i, o in zip(principal.indices, (0, 1550), strict=True)]
    )  # 1550: weight and bias before
    large = start[trained].abs() > 0.05  # smaller numbers have finer steps
    assert (flat(lossy)[trained][large] == start[trained][large]).float().mean() > 0.95
    assert (flat(model)[trained][large] != start[trained][large]).float().mean() > 0.5


def test_refresh_carries_state_over_by_position():
    model = mlp()
    principal = make(model)
    optimizer = torch.optim.Adam([principal.values], lr=1e-2, amsgrad=True)
    for seed in range(3):
        loss_of(model, seed).backward()
        optimizer.step()
        principal.scatter()
    with torch.no_grad():
        model[0].weight[:10] *= 3  # other entries become principal
    before = {
        (number, index): position
        for number, (indices, offset) in enumerate(zip(principal.indices, (0, len(principal.indices[0])), strict=True))
        for position, index in enumerate(indices.tolist(), offset)
    }
    old_values, parameter = principal.values.detach().clone(), principal.values
    old = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    survived = principal.refresh(optimizer)
    assert principal.values is parameter
    state, stayed = optimizer.state[parameter], 0
    offset = 0
    for number, (indices, weight) in enumerate(zip(principal.indices, (model[0].weight, model[2].weight), strict=True)):
        for position, index in enumerate(indices.tolist(), offset):
            source = before.get((number, index))
            stayed += source is not None
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                assert state[key][position] == (0 if source is None else old[key][source])
            expected = weight.flatten()[index] if source is None else old_values[source]
            assert principal.values[position] == expected
        offset += len(indices)
    assert state["step"] == old["step"] == 3
    assert survived == stayed / offset
    assert 0 < survived < 1
    loss_of(model, 9).backward()
    optimizer.step()
    principal.scatter()


def test_state_that_cannot_be_carried_over_is_refused_by_name():
    model = mlp()
    principal = make(model)
    optimizer = torch.optim.SGD([principal.values], lr=0.1, momentum=0.9)
    loss_of(model, 0).backward()
    optimizer.step()
    principal.refresh(optimizer)
    optimizer.state[principal.values]["factored_rows"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'factored_rows' has shape \(3,\)"):
        principal.refresh(optimizer)


def test_a_criterion_is_a_function():
    model = mlp()
    principal = make(model, criterion=lambda weight, count, seed: torch.arange(count))
    assert [indices.tolist() for indices in principal.indices] == [list(range(150)), list(range(35))]


@pytest.mark.parametrize(
    ("criterion", "problem"),
    [
        (lambda weight, count, seed: torch.arange(count - 1), r"must return \[150\] int64, got \[149\] torch.int64"),
        (lambda weight, count, seed: torch.arange(count).int(), "torch.int32"),
        (lambda weight, count, seed: torch.arange(count).flip(0), "ascending"),
        (lambda weight, count, seed: torch.arange(count) // 2, "ascending"),
        (lambda weight, count, seed: torch.arange(count) + 1400, "below 1500"),
    ],
)
def test_what_a_criterion_returns_is_checked(criterion, problem):
    with pytest.raises(ValueError, match=rf"0\.weight: .*{problem}"):
        make(mlp(), criterion=criterion)


def test_a_density_that_selects_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        make(mlp(), density=1e-6)


def test_modules_are_chosen_by_pattern_and_the_head_stays_out(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    names = [m.name for m in make(model, modules=["*.mlp.*"]).matrices]
    assert len(names) == 6
    assert all(".mlp." in name for name in names)
    assert len(make(model).matrices) == 14
    with pytest.raises(
        ValueError, match=r"no linear module fits nothing; a name is model\.layers\.0\.self_attn\.q_proj"
    ):
        make(model, modules=["nothing"])


def test_weights_that_are_not_finite_are_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2\.weight: weight holds NaN or infinity"):
        make(model)


def test_in_the_trainer_of_transformers(tiny_model, tmp_path):
    """The engine inside ``transformers.Trainer`` equals the plain loop."""

    class Lift(TrainerCallback):
        def __init__(self, principal, optimizer):
            self.principal, self.optimizer = principal, optimizer

        def on_step_begin(self, args, state, control, **_):
            if (state.global_step + 1) % 3 == 0:
                self.principal.refresh(self.optimizer)

        def on_pre_optimizer_step(self, args, state, control, **_):
            self.principal.reduce_gradients()

        def on_optimizer_step(self, args, state, control, **_):
            self.principal.scatter()

    tokens = torch.randint(0, 1000, (16, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def prepared():
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        principal = PrincipalWeights(model, density=0.05, filter_rank=4)
        return model, principal, torch.optim.AdamW([principal.values], lr=1e-3, weight_decay=0.0)

    model, principal, optimizer = prepared()
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], save_strategy="no",
        train_sampling_strategy="sequential", use_cpu=True, max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, constant), callbacks=[Lift(principal, optimizer)]
    ).train()

    expected, principal, optimizer = prepared()
    for step in range(1, 5):
        if step % 3 == 0:
            principal.refresh(optimizer)
        chunk = tokens[4 * (step - 1) : 4 * step]
        expected(input_ids=chunk, labels=chunk).loss.backward()
        principal.reduce_gradients()
        optimizer.step()
        principal.scatter()
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.allclose(flat(model), flat(expected), atol=1e-6)
    assert not torch.equal(flat(model), flat(start))


# ---------------------------------------------------------------------------------------------------------------------
# On two ranks.


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
    return max(itertools.accumulate(e.nbytes() // nbytes for e in sorted(events, key=lambda e: e.start_ns())))


def on_two_ranks(mesh):
    return dict(
        bf16=unrounded_gradient(mesh),
        together=unrounded_gradient(mesh, together=True),
        averaged=averages(mesh),
        sparse=sparse_and_dense(mesh),
        memory=memory_of_a_step(mesh),
        mixed=mixed_layouts(mesh),
    )


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
    held = [s.unit.reduced for s in principal._slots if s.unit.reduced is not None]
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
    """Of both exchanges: the flat gradient of two micro-batches, the bytes reduced, and the gradient after a refresh."""
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
        model(inputs, False).float().square().mean().backward()
        found[skip, sparse] = grad, reduced, principal.values.grad.clone()
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
        principal.scatter()
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
            (grad, reduced, later), (sparse, sparse_reduced, sparse_later) = (
                rank["sparse"][skip, sparse] for sparse in (False, True)
            )
            assert torch.equal(grad, sparse)
            assert torch.equal(later, sparse_later)
            assert (grad != 0).double().mean() > 0.95
            assert (later != 0).double().mean() > 0.95
            assert sparse_reduced < (0.5 if skip else 0.08) * reduced


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
