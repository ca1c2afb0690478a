"""What only a GPU shows: streams, NCCL, device placement. One GPU is enough."""

import json
import shutil

import builders
import pytest
import torch
from commands import run_command, write_config
from plain_models import flat, make, mlp

from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.criteria import low_rank
from liftdist.engine.factors import FACTORINGS
from liftdist.engine.quantisation import Format

pytestmark = pytest.mark.gpu


def test_selection_on_a_gpu_agrees_with_the_cpu():
    weight = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    for method in FACTORINGS:
        on_cpu = low_rank.select(weight, 31500, 16, method)
        on_gpu = [low_rank.select(weight.cuda(), 31500, 16, method) for _ in range(2)]
        assert torch.equal(*on_gpu)
        assert torch.isin(on_gpu[0].cpu(), on_cpu).float().mean() > 0.999


def test_a_plain_model_on_a_gpu_follows_the_cpu():
    weights = []
    for device in ("cpu", "cuda"):
        model = mlp().to(device)
        principal = make(model, method="exact")
        optimizer = torch.optim.AdamW([principal.values], lr=1e-3, fused=True)
        for seed in range(4):
            if seed == 2:
                principal.refresh(optimizer)
            inputs = torch.randn(16, 30, generator=torch.Generator().manual_seed(seed)).to(device)
            model(inputs).square().mean().backward()
            principal.clip_grad_norm_(1.0)
            optimizer.step()
            principal.write_back()
        weights.append(flat(model).cpu())
    assert torch.allclose(*weights, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_and_write_back_in_one_kernel(dtype):
    found = []
    for in_one_kernel in (True, False):
        model = mlp(dtype).cuda()
        principal = make(model, method="exact")
        optimizer = PrincipalAdamW(principal, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
        assert optimizer.in_one_kernel
        optimizer.in_one_kernel = in_one_kernel
        for step in range(4):
            principal.values.grad.normal_(generator=torch.Generator("cuda").manual_seed(step))
            optimizer.step()
        assert not principal.values.grad.any()
        found.append((principal.values.detach(), flat(model), *optimizer.state[principal.values].values()))
    for one, stock in zip(*found, strict=True):
        assert torch.allclose(one, stock, rtol=1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_weights_are_quantised_as_on_the_cpu(kind):
    rows = torch.randn(2000, 700, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype in (torch.float32, torch.bfloat16):
        format, weights = Format(kind, 700), rows.to(dtype)
        for on_gpu, on_cpu in zip(format.quantise(weights.cuda()), format.quantise(weights), strict=True):
            assert torch.equal(on_gpu.cpu(), on_cpu)
        assert torch.equal(format.rounded(weights.cuda()).cpu(), format.rounded(weights))


def on_values(device, dtype):
    """First weights after steps that check what travels; kernels that are slow stand before the copies."""
    model = mlp(dtype).cuda()
    principal = make(model, method="exact", device=device)
    optimizer = PrincipalAdamW(principal, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer.in_one_kernel = False
    dense, first = [[] for _ in principal.parts], None
    for part, gradients in zip(principal.parts, dense, strict=True):
        part.param.register_hook(lambda gradient, to=gradients: to.append(gradient.detach().float().flatten()))
    for seed in range(4):
        if seed == 2:
            principal.refresh(optimizer)
        for micro in range(2):
            inputs = torch.randn(16, 30, generator=torch.Generator().manual_seed(2 * seed + micro)).to(dtype).cuda()
            torch.cuda._sleep(50_000_000)
            model(inputs).square().mean().backward()
        arrived = principal.values.grad.clone()  # at once, as any optimizer would take it
        pairs = zip(dense, principal.parts, strict=True)
        assert torch.equal(arrived.cuda(), torch.cat([sum(taken)[part.positions] for taken, part in pairs]))
        for gradients in dense:
            gradients.clear()
        principal.reduce_gradients(torch.tensor(2.0, device="cuda"))
        assert principal.clip_grad_norm_(1.0).is_cuda
        torch.cuda._sleep(50_000_000)
        optimizer.step()
        held = principal.values.detach().clone()
        principal.values.data.add_(1.0)  # before it has been sent
        read = torch.cat([part.read(part.positions) for part in principal.parts])
        assert torch.equal(read.cpu(), held.cpu().to(dtype))
        principal.values.data.copy_(held)
        first = first if seed else read
    state = optimizer.state[principal.values]
    assert {tensor.device.type for tensor in (principal.values, state["exp_avg"])} == {device or "cuda"}
    assert all(part.kept.is_pinned() for part in principal.parts) == (device == "cpu")
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_on_the_host_of_a_model_on_a_gpu(dtype):
    first, other = on_values(None, dtype), on_values("cpu", dtype)
    assert torch.allclose(first, other, rtol=1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_gpu_memory_of_principal_weights(device):
    """What is on the host takes none: 20 B a weight."""
    torch.cuda.empty_cache()
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(4))).cuda()
    model(torch.ones(4, 2048, device="cuda")).mean().backward()  # cuBLAS allocates its workspace, which stays
    model.requires_grad_(False).zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    principal = make(model, density=0.5, device=device, criterion=lambda weight, count, seed: torch.arange(count))
    optimizer = PrincipalAdamW(principal)
    for _ in range(2):
        model(torch.ones(4, 2048, device="cuda")).mean().backward()
        principal.reduce_gradients()
        optimizer.step()
    torch.cuda.synchronize()
    each = (torch.cuda.memory_allocated() - before) / principal.num_selected
    assert each == pytest.approx(20, rel=0.05) if device is None else each < 1


@pytest.mark.parametrize("asked", [[], ["optimizer.device=cpu"], ["model.base_dtype=nf4"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(dtype, asked, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    run = run_command(
        "train", config, f"model.dtype={dtype}", "train.deterministic=true", *asked,
        environment={"CUDA_VISIBLE_DEVICES": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["memory_gib/device_peak/rank0"] > 0 for line in lines if "train/loss" in line)
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", ["", "cpu"])
def test_a_run_on_a_gpu_continues_to_the_bit(device, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    last = tmp_path / "run" / "checkpoints" / "step-00000005"
    hashes = []
    for _ in range(2):
        run = run_command(
            "train", config, "model.dtype=bfloat16", "train.deterministic=true", "train.export=false",
            f"optimizer.device={device}", "checkpoint.interval=1", "checkpoint.keep=9", environment={"CUDA_VISIBLE_DEVICES": "0"},
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        files = json.loads((last / "manifest.json").read_text())["files"]
        hashes.append([entry["sha256"] for entry in files.values()])
        for step in (4, 5):  # as if it had been killed after step 3
            shutil.rmtree(last.with_name(f"step-{step:08d}"))
    assert "continuing after step 3 of 5" in run.stdout
    assert hashes[0] == hashes[1]
