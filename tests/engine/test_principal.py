"""The engine by itself: plain models, someone else's loop, FSDP2 in bf16."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from plain_models import flat, loss_of, make, mlp
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from liftdist import PrincipalWeights


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
        principal.write_back()
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
            principal.write_back()
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
        principal.write_back()
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
        principal.write_back()
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
    principal.write_back()


def test_quantised_state_is_quantised_anew(monkeypatch):
    """By a refresh, and by a load; entries stay within what eight bits hold."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "torchao")  # where launch/setup puts it
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # half a minute for the same numbers
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 7))
    start = copy.deepcopy(model)
    principal = make(model, multiple_of=256)
    assert principal.values.numel() % 256 == 0 < principal.values.numel() - principal.num_selected
    optimizer = optim.AdamW8bit([principal.values], lr=1e-3)
    data = torch.randn(16, 300)

    def step():
        model(data).square().mean().backward()
        optimizer.step()
        principal.write_back()

    for _ in range(3):
        step()
    old = {key: value.dequantize() for key, value in optimizer.state[principal.values].items() if value.ndim}
    old_indices = principal.indices
    with torch.no_grad():
        model[0].weight[:20] *= 3
    survived = principal.refresh(optimizer)
    state = optimizer.state[principal.values]
    assert 0 < survived < 1
    for key, before in old.items():
        after, begin = state[key].dequantize(), 0
        assert after.shape == principal.values.shape
        for indices, previous in zip(principal.indices, old_indices, strict=True):
            stayed = torch.isin(indices, previous)
            source = torch.searchsorted(previous, indices[stayed]) + begin  # the number of a matrix does not change
            expected = torch.zeros(len(indices))
            expected[stayed] = before[source]
            part = after[begin : begin + len(indices)]
            assert torch.allclose(part, expected, rtol=0.15, atol=0.02 * before.abs().max().item())
            begin += len(indices)
        assert not after[begin:].any()
    step()
    saved, scalars = principal.state_dict(optimizer), principal.scalar_states(optimizer)
    resumed = make(start, multiple_of=256)
    other = optim.AdamW8bit([resumed.values], lr=1e-3)
    resumed.load_state_dict(saved, other, scalars)
    assert torch.equal(resumed.values, principal.values)
    assert other.state[resumed.values]["step"] == 4
    for key in old:
        ours, theirs = state[key], other.state[resumed.values][key]
        assert type(ours) is type(theirs)
        close = dict(rtol=0.15, atol=0.02 * ours.dequantize().abs().max().item())
        assert torch.allclose(ours.dequantize(), theirs.dequantize(), **close)


def test_a_model_that_is_dropped_is_freed():
    model = mlp()
    principal = make(model)
    loss_of(model, 0).backward()
    alive = [weakref.ref(param) for param in (*model.parameters(), principal.values)]
    del model, principal
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_model_has_principal_weights_once():
    model = mlp()
    first = make(model)
    with pytest.raises(ValueError, match="has principal weights already"):
        make(model)
    del first
    second = make(model)
    loss_of(model, 0).backward()
    assert second.values.grad.any()


def test_initial_indices_may_be_of_another_kind():
    model = mlp()
    chosen = [indices.long() for indices in make(mlp()).indices]
    principal = make(model, initial_indices=lambda _: [i.repeat_interleave(2)[::2] for i in chosen])
    assert all(indices.dtype == torch.int32 and indices.is_contiguous() for indices in principal.indices)
    assert all(map(torch.equal, (indices.long() for indices in principal.indices), chosen))


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
        ValueError, match=r"no linear module fits nothing; one module is named model\.layers\.0\.self_attn\.q_proj"
    ):
        make(model, modules=["*.mlp.*", "nothing"])


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
            self.principal.write_back()

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
        principal.write_back()
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert torch.allclose(flat(model), flat(expected), atol=1e-6)
    assert not torch.equal(flat(model), flat(start))
