"""Values and moments in bf16: the steps that torch's AdamW takes on bf16 parameters, to the bit, and what is refused."""

import pytest
import torch
from plain_models import flat, loss_of, make, mlp

from liftdist.engine.adamw import PrincipalAdamW
from liftdist.methods.lift import Lift
from liftdist.schema import Config

BF16 = torch.bfloat16
STEPS = 60


def make_lift(model, dtype="bfloat16", **optimizer):
    config = Config()
    config.optimizer.dtype = dtype
    for key, value in optimizer.items():
        assert hasattr(config.optimizer, key)
        setattr(config.optimizer, key, value)
    return Lift(config, make(model, method="exact", dtype=getattr(torch, dtype)))


def trained(model, lift, gradients=None, micro_batches=1):
    for number in range(1, STEPS + 1):
        for micro in range(micro_batches):
            loss_of(model, micro_batches * number + micro).backward()
        lift.principal.reduce_gradients(micro_batches)
        lift.clip()
        if gradients is not None:
            gradients.append(lift.principal.values.grad.clone())
        lift.step()
    return lift


CASES = {
    "plain": {},
    "small steps": dict(lr=1e-5),
    "large steps": dict(lr=3e-2),
    "large epsilon": dict(eps=1e-2),
    "epsilon as the authors": dict(reference_numerics=True, eps=1e-2),
    "epsilon as the authors, small steps": dict(reference_numerics=True, lr=1e-5),
    "weight decay": dict(weight_decay=0.1),
    "other moments": dict(betas=[0.9, 0.999]),
    "no first moment": dict(betas=[0.0, 0.95]),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_bf16_values_are_stepped_as_bf16_parameters_are(settings):
    """By torch's AdamW on the whole model, whose other gradients are zero."""
    settings = dict(lr=1e-3) | settings
    model, dense = mlp(BF16), mlp(BF16)
    lift = make_lift(model, **settings)
    masks = []
    for matrix, indices in zip(lift.matrices, lift.principal.indices, strict=True):
        mask = torch.zeros(matrix.numel_local, dtype=BF16)
        mask[indices] = 1
        masks.append(mask.view(matrix.shape))
    trained(model, lift)
    weights = [dense[0].weight, dense[2].weight]
    wanted = lift.optimizer.defaults
    stock = torch.optim.AdamW(weights, **{key: wanted[key] for key in ("lr", "betas", "weight_decay")}, fused=True)
    for number in range(1, STEPS + 1):
        loss_of(dense, number).backward()
        before = [weight.detach().clone() for weight in weights]
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad *= mask
        eps, beta2 = lift._config.optimizer.eps, wanted["betas"][1]
        stock.param_groups[0]["eps"] = eps / (1 - beta2**number) ** 0.5 if "reference_numerics" in settings else eps
        stock.step()
        dense.zero_grad()
        with torch.no_grad():  # weight decay must not reach the others
            for weight, old, mask in zip(weights, before, masks, strict=True):
                weight.copy_(torch.where(mask.bool(), weight, old))
    assert torch.equal(flat(model), flat(dense))
    state = lift.optimizer.state[lift.principal.values]
    for key in ("exp_avg", "exp_avg_sq"):
        expected = torch.cat([stock.state[w][key][m.bool()] for w, m in zip(weights, masks, strict=True)])
        assert state[key].dtype == BF16
        assert torch.equal(state[key], expected)
        assert state[key].any()


@pytest.mark.parametrize("reference", [False, True])
def test_where_epsilon_is_added(reference):
    """Adam written out, with values and moments rounded to bf16 at the end of each step."""
    lr, beta1, beta2, eps = 1e-3, 0.9, 0.95, 1e-2
    model = mlp(BF16)
    lift = make_lift(model, lr=lr, eps=eps, reference_numerics=reference)
    values = lift.principal.values.detach().clone()
    gradients = []
    trained(model, lift, gradients)
    first = second = torch.zeros_like(values)
    for number, gradient in enumerate(gradients, 1):
        gradient = gradient.to(BF16).double()
        first = beta1 * first.double() + (1 - beta1) * gradient
        second = beta2 * second.double() + (1 - beta2) * gradient**2
        correction1, root2 = 1 - beta1**number, (1 - beta2**number) ** 0.5
        if reference:
            update = lr * root2 / correction1 * first / (second.sqrt() + eps)
        else:
            update = lr / correction1 * first / (second.sqrt() / root2 + eps)
        values, first, second = ((values.double() - update).to(BF16), first.to(BF16), second.to(BF16))
    assert (lift.principal.values == values).float().mean() > 0.99  # float32 and float64 may round to either neighbour
    other = trained(m := mlp(BF16), make_lift(m, lr=lr, eps=eps, reference_numerics=not reference))
    assert (other.principal.values == values).float().mean() < 0.7


def test_gradients_add_up_in_float32_and_are_rounded_once():
    model = mlp(BF16)
    lift = make_lift(model, lr=1e-3, max_grad_norm=1e-2)
    gradients = []
    trained(model, lift, gradients, micro_batches=3)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert any((gradient != gradient.to(BF16)).any() for gradient in gradients)
    assert lift.principal.values.grad.dtype == torch.float32
    assert not lift.principal.values.grad.any()
    start = mlp(BF16)
    twin = make_lift(start)
    stock = torch.optim.AdamW([values := twin.principal.values.detach().clone().requires_grad_()], lr=1e-3,
                              betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True)  # fmt: skip
    for gradient in gradients:
        values.grad = gradient.to(BF16)
        stock.step()
    assert torch.equal(lift.principal.values, values)


def test_small_updates_are_lost_in_bf16_and_kept_in_float32():
    moved = {}
    for dtype in ("bfloat16", "float32"):
        model = mlp(BF16)
        start, lift = flat(model), trained(model, make_lift(model, dtype, lr=2e-5))
        moved[dtype] = int((flat(model) != start).sum()) / lift.principal.num_selected
    assert moved["bfloat16"] < 0.5 * moved["float32"]
    assert moved["bfloat16"] > 0


def test_a_refresh_carries_bf16_values_and_moments_over():
    model = mlp(BF16)
    lift = trained(model, make_lift(model, lr=1e-2))
    with torch.no_grad():
        model[0].weight[:10] *= 3  # other entries become principal
    state = lift.optimizer.state[lift.principal.values]
    places = [dict(zip(indices.tolist(), range(len(indices)), strict=True)) for indices in lift.principal.indices]
    old = {key: tensor.clone() for key, tensor in state.items() if tensor.ndim}
    assert 0 < lift.principal.refresh(lift.optimizer) < 1
    state = lift.optimizer.state[lift.principal.values]
    begin = 0
    for number, indices in enumerate(lift.principal.indices):
        shift = sum(map(len, places[:number]))
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype == BF16
            expected = [old[key][shift + places[number][i]] if i in places[number] else 0 for i in indices.tolist()]
            assert torch.equal(state[key][begin : begin + len(indices)], torch.tensor(expected, dtype=BF16))
        begin += len(indices)
    before = flat(model)
    trained(model, lift)
    assert lift.principal.values.dtype == BF16
    assert (flat(model) != before).any()


@pytest.mark.parametrize(
    ("weights", "dtype", "problem"),
    [
        (torch.float32, BF16, "dtype bfloat16 is for bfloat16 weights: 0.weight has torch.float32"),
        (torch.float16, BF16, "dtype bfloat16 is for bfloat16 weights: 0.weight has torch.float16"),
        (torch.float64, BF16, "dtype bfloat16 is for bfloat16 weights: 0.weight has torch.float64"),
        (BF16, torch.float16, "dtype must be float32 or bfloat16, got torch.float16"),
        (BF16, torch.float64, "dtype must be float32 or bfloat16, got torch.float64"),
        (BF16, torch.int8, "dtype must be float32 or bfloat16, got torch.int8"),
    ],
)
def test_dtypes_that_make_no_sense_are_refused(weights, dtype, problem):
    with pytest.raises(ValueError, match=problem):
        make(mlp().to(weights), dtype=dtype)


def test_a_layer_of_another_dtype_is_named():
    model = mlp(BF16)
    model[2].float()
    with pytest.raises(ValueError, match=r"2\.weight has torch\.float32"):
        make(model, dtype=BF16)


def test_an_optimizer_that_cannot_round_the_gradient_does_not_step_silently():
    model = mlp(BF16)
    principal = make(model, dtype=BF16)
    loss_of(model, 0).backward()
    before = flat(model)
    with pytest.raises(RuntimeError, match="BFloat16"):
        torch.optim.AdamW([principal.values], fused=True).step()
    assert torch.equal(flat(model), before)
    PrincipalAdamW(principal, lr=1e-2).step()
    assert (flat(model) != before).any()


def test_epsilon_follows_the_steps_of_the_optimizer_not_of_the_run():
    """An optimizer that takes over in the middle of a run has moments of no step, as at the start."""
    lift = trained(model := mlp(), make_lift(model, "float32", name="sgd", lr=1e-2))
    other, fresh = mlp(), mlp()
    after = make_lift(other, "float32", reference_numerics=True, eps=1e-2)
    after.load_state_dict(lift.state_dict(), lift.scalars())
    epsilons = []
    for number in range(STEPS + 1, STEPS + 4):
        loss_of(other, number).backward()
        after.reduce(1)
        after.step()
        epsilons.append(after.optimizer.param_groups[0]["eps"])
    assert epsilons == pytest.approx([1e-2 / (1 - 0.95**own) ** 0.5 for own in (1, 2, 3)])
    again = make_lift(fresh, "float32", reference_numerics=True, eps=1e-2)
    again.load_state_dict(after.state_dict(), after.scalars())
    again.reduce(1)
    again.step()
    assert again.optimizer.param_groups[0]["eps"] == pytest.approx(1e-2 / (1 - 0.95**4) ** 0.5)


def test_the_state_of_another_optimizer_is_left_out():
    """A run may continue with another optimizer if the change is allowed: values go on, moments begin anew."""
    model, other = mlp(), mlp()
    lift = trained(model, make_lift(model, "float32", lr=1e-2))
    after = make_lift(other, "float32", name="sgd", lr=1e-2)
    after.load_state_dict(lift.state_dict(), lift.scalars())
    assert torch.equal(flat(other), flat(model))
    loss_of(other, 0).backward()
    after.reduce(1)
    after.step()
    assert not torch.equal(flat(other), flat(model))
    assert {key.partition("/optimizer.")[2] for key in after.state_dict() if "/optimizer." in key} == {
        "momentum_buffer"
    }
