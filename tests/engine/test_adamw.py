"""AdamW and scatter in one kernel are torch's AdamW and scatter, one after the other."""

import sys

import pytest
import torch
from plain_models import flat, loss_of, make, mlp

import liftdist
from liftdist import PrincipalWeights
from liftdist.engine.adamw import PrincipalAdamW


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter runs the kernel on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _forget_kernels()
    yield
    _forget_kernels()


def _forget_kernels():
    """Triton looks at the environment when the module is read."""
    if sys.modules.pop("liftdist.engine.kernels", None):
        del liftdist.engine.kernels


def trained(in_one_kernel, dtype, steps=6):
    model = mlp().to(dtype)
    principal = make(model, method="exact")
    optimizer = PrincipalAdamW(principal, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    assert not optimizer.in_one_kernel
    optimizer.in_one_kernel = in_one_kernel
    for step in range(steps):
        if step == 3:
            principal.refresh(optimizer)
        loss_of(model, step).backward()
        principal.reduce_gradients()
        optimizer.step()
        assert not principal.values.grad.any()
    return model, principal, optimizer


def test_one_kernel_does_what_torch_does(interpreter):
    (model, one, fused), (oracle_model, oracle, stock) = (trained(on, torch.float32) for on in (True, False))
    for indices, expected in zip(one.indices, oracle.indices, strict=True):
        assert torch.equal(indices, expected)
    assert torch.allclose(one.values, oracle.values, rtol=0, atol=1e-5)
    assert torch.allclose(flat(model), flat(oracle_model), rtol=0, atol=1e-5)
    state, expected = fused.state[one.values], stock.state[oracle.values]
    assert set(state) == set(expected)
    assert state["step"] == expected["step"] == 6
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(state[key], expected[key], rtol=1e-3, atol=1e-7)


def test_weights_in_bf16_are_the_rounded_values(interpreter):
    """Of the interpreter cut off, where a GPU rounds them."""
    model, principal, _ = trained(True, torch.bfloat16, steps=2)
    _, oracle, _ = trained(False, torch.bfloat16, steps=2)
    assert torch.allclose(principal.values, oracle.values, rtol=0, atol=1e-6)
    written = torch.cat(
        [
            matrix.rows_local.view(-1)[indices]
            for matrix, indices in zip(principal.matrices, principal.indices, strict=True)
        ]
    ).float()
    assert torch.allclose(written, principal.values, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert (written != principal.values).any()
    assert model[0].weight.dtype == torch.bfloat16


def test_only_selected_weights_are_written(interpreter):
    before = flat(mlp())
    model, principal, _ = trained(True, torch.float32, steps=3)
    changed = int((flat(model) != before).sum())
    assert changed == principal.values.numel()


def test_no_kernel_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    optimizer = PrincipalAdamW(make(mlp()))
    with pytest.warns(UserWarning, match="no Triton kernel here"):
        assert not optimizer._compiles()


def test_what_the_kernel_does_not_do_is_left_to_torch(interpreter):
    """A setting changed, a state saved by torch's AdamW, and a GradScaler that finds infinities."""
    results = []
    for in_one_kernel in (True, False):
        model, principal, optimizer = trained(in_one_kernel, torch.float32, steps=2)
        plain = torch.optim.AdamW([principal.values], lr=1e-2)
        plain.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(plain.state_dict())
        optimizer.param_groups[0]["maximize"] = True
        loss_of(model, 2).backward()
        optimizer.step()
        optimizer.param_groups[0]["maximize"] = False
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, float("inf")):
            scaler.scale(loss_of(model, 3) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            principal.drop_gradients()
        results.append(principal.values.detach())
    assert torch.isfinite(results[0]).all()
    assert torch.allclose(*results, rtol=0, atol=1e-5)


def test_a_closure_is_called_first(interpreter):
    model, principal, optimizer = trained(True, torch.float32, steps=2)

    def closure():
        loss = loss_of(model, 9)
        loss.backward()
        return loss

    before = principal.values.detach().clone()
    assert optimizer.step(closure) > 0
    assert (principal.values != before).any()


def test_a_bug_in_the_kernel_is_raised(interpreter, monkeypatch):
    """Only a missing compiler or driver makes do without it; anything else was a warning before."""
    from liftdist.engine import kernels

    class Broken:
        def __getitem__(self, grid):
            def launch(*_, **__):
                raise TypeError("a bug in the kernel's arguments")

            return launch

    model = mlp()
    principal = PrincipalWeights(model, density=0.05, filter_rank=8)
    optimizer = PrincipalAdamW(principal)
    monkeypatch.setattr(kernels, "adamw_and_write_back", Broken())
    with pytest.raises(TypeError, match="a bug in the kernel's arguments"):
        optimizer._compiles_everywhere()


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_compiles_for_gpus_and_rounds_there(architecture):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from liftdist.engine import kernels

    entries = dict.fromkeys(("scales", "values", "gradient", "first", "second"), "*fp32")
    numbers = dict.fromkeys(("beta1", "beta2", "eps", "decay"), "fp32")
    signature = {"segments": "*i64"} | entries | numbers | {"WEIGHT": "constexpr", "BLOCK": "constexpr"}
    constants = {"WEIGHT": triton.language.bfloat16, "BLOCK": 1024}
    source = ASTSource(kernels.adamw_and_write_back, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert "cvt.rn.bf16" in compiled.asm["ptx"]
