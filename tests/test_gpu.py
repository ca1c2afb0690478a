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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(dtype, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    run = run_command(
        "train", config, f"model.dtype={dtype}", "train.deterministic=true", environment={"CUDA_VISIBLE_DEVICES": "0"}
    )
    assert run.returncode == 0, run.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["memory_gib/device_peak/rank0"] > 0 for line in lines if "train/loss" in line)
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert losses[-1] < losses[0]


def test_a_run_on_a_gpu_continues_to_the_bit(tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    last = tmp_path / "run" / "checkpoints" / "step-00000005"
    hashes = []
    for _ in range(2):
        run = run_command(
            "train", config, "model.dtype=bfloat16", "train.deterministic=true", "train.export=false",
            "checkpoint.interval=1", "checkpoint.keep=9", environment={"CUDA_VISIBLE_DEVICES": "0"},
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        files = json.loads((last / "manifest.json").read_text())["files"]
        hashes.append([entry["sha256"] for entry in files.values()])
        for step in (4, 5):  # as if it had been killed after step 3
            shutil.rmtree(last.with_name(f"step-{step:08d}"))
    assert "continuing after step 3 of 5" in run.stdout
    assert hashes[0] == hashes[1]
