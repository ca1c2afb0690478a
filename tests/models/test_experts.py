"""Experts: selected matrix by matrix as their checkpoint holds them, saved, exported, applied and undone by those names."""

import shutil

import builders
import families
import pytest
import ranks
import torch
from commands import liftdist, run_command, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from liftdist import PrincipalWeights
from liftdist.deltas import file as delta_file
from liftdist.deltas.module import change_module
from liftdist.engine import selection
from liftdist.engine.criteria import low_rank
from liftdist.engine.matrices import principal_matrices
from liftdist.engine.quantisation import Format
from liftdist.model_settings import ModelConfig
from liftdist.models.load import load
from liftdist.runs import checkpoint

DENSITY, FILTER_RANK = 0.1, 4


def moe(folder, tokenizer_from=None, experts=5, **sizes):
    """A small Qwen3 MoE: the checkpoint has a tensor for each matrix of each expert."""
    own = dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48, head_dim=12)
    return builders.llama(folder, tokenizer_from, "qwen3_moe", **(own | dict(num_attention_heads=4) | sizes))


def selected(mesh, folder):
    model, _ = load(folder, ModelConfig(path=str(folder), dtype="float32"), mesh)
    principal = PrincipalWeights(model, density=DENSITY, filter_rank=FILTER_RANK)
    pairs = zip(principal.matrices, principal.indices, strict=True)
    return {matrix.name: (indices + matrix.offset_local).tolist() for matrix, indices in pairs}


@pytest.mark.parametrize(("world_size", "experts"), [(1, 4), (2, 5), (3, 4), (3, 2)])
def test_each_expert_has_the_selection_of_its_own_matrix(world_size, experts, tmp_path):
    """Whether or not the ranks share the experts evenly, and where some have none."""
    folder = moe(tmp_path / "model", experts=experts)
    found = ranks.run(world_size, selected, folder)
    stored = load_file(folder / "model.safetensors")
    of_experts = [name for name in stored if ".experts." in name]
    assert len(of_experts) == 2 * experts * 3
    for name in of_experts:
        assert (
            sorted(index for share in found for index in share[name])
            == low_rank.select(
                stored[name],
                round(DENSITY * stored[name].numel()),
                FILTER_RANK,
                method="fast",
                seed=selection.seed_of(name),
            ).tolist()
        )


def test_routers_are_left_out_and_patterns_choose_experts(tmp_path):
    model = builders.frozen_model(
        tmp_path / "model", "qwen2_moe", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24
    )
    every = set(principal_matrices(model))
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in every
    assert not any("gate.weight" in name or "shared_expert_gate" in name for name in every)
    ups = principal_matrices(model, ["*.experts.[13].up_proj"])
    assert sorted(ups) == [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in (0, 1) for e in (1, 3)]


def test_a_run_is_exported_applied_and_undone_by_the_names_of_the_checkpoint(smollm2, tmp_path):
    """A sharded folder in bf16, trained on two ranks: the run's delta, in memory and on disk, to the bit."""
    base = moe(tmp_path / "base", smollm2, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="1MB")
    (base / "model.safetensors").unlink()
    records = builders.write_records(tmp_path / "records.jsonl")
    sections = dict(selection=dict(refresh_interval=2), optimizer=dict(lr=0.05), train=dict(steps=4))
    run = run_command("train", write_config(tmp_path, base, records, **sections), "--nproc", 2, "model.dtype=bfloat16")
    assert run.returncode == 0, run.stdout
    cache = ("--cache-dir", tmp_path / "cache")
    liftdist("export", tmp_path / "run", "--format", "hf", "--output", tmp_path / "hf", *cache)
    liftdist("export", tmp_path / "run", "--format", "delta", "--output", tmp_path / "delta", *cache)
    liftdist("diff", base, tmp_path / "hf", "--output", tmp_path / "other", *cache)
    one, other = (delta_file.read(tmp_path / name) for name in ("delta", "other"))
    touched = [name for name in one.names if one.get(name).indices.numel()]
    assert sum(".experts." in name for name in touched) > 20
    assert all(torch.equal(one.get(name).indices, other.get(name).indices) for name in touched)

    liftdist("apply", tmp_path / "delta", base, "--output", tmp_path / "applied", *cache)
    liftdist("apply", tmp_path / "delta", tmp_path / "applied", "--undo", "--output", tmp_path / "undone", *cache)

    def same(one, other):
        files = sorted(path.name for path in one.glob("*.safetensors"))
        assert len(files) > 1
        return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)

    assert same(tmp_path / "hf", tmp_path / "run" / "export")
    assert same(tmp_path / "hf", tmp_path / "applied")
    assert same(base, tmp_path / "undone")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in model.state_dict().items() if "experts" in name)
    change_module(model, one)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    change_module(model, undo=one)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_runs_on_experts_that_are_stored_transposed(smollm2, monkeypatch, tmp_path):
    """Fully, and over a rounded base, whose rows are those of the parameters, by blocks that files have in columns."""
    special = dict(image_token_id=49150, video_token_id=49149, vision_start_token_id=49148, vision_end_token_id=49147)
    monkeypatch.setattr(
        families, "SMALL", families.SMALL | special | dict(vocab_size=49152, max_position_embeddings=512)
    )
    base = families.make(tmp_path / "base", "qwen3_vl_moe")
    for name in builders.TOKENIZER_FILES:
        shutil.copy(smollm2 / name, base / name)
    records = builders.write_records(tmp_path / "records.jsonl")
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    before = load_file(base / "model.safetensors")[name]

    def trained(kind, *asked):
        folder = tmp_path / kind
        folder.mkdir()
        config = write_config(folder, base, records, data=dict(eval_path=None), train=dict(steps=2, eval_interval=0))
        run = run_command("train", config, "--nproc", 2, *asked)
        assert run.returncode == 0, run.stdout
        return load_file(folder / "run" / "export" / "model.safetensors")[name]

    after = trained("full", "method=full", "selection.density=null")
    assert (after != before).float().mean() > 0.9
    step = checkpoint.open_step(tmp_path / "full" / "run" / "checkpoints" / "step-00000002")
    for expert, stored in enumerate(after):
        assert torch.equal(step.whole(f"{name}.{expert}", "values").view(stored.mT.shape), stored.mT)

    changed = (after := trained("rounded", "model.base_dtype=nf4")) != before
    assert 0 < changed.float().mean() < 0.1
    liftdist(
        "export",
        tmp_path / "rounded/run",
        "--format",
        "as_trained",
        "--output",
        tmp_path / "out",
        "--cache-dir",
        tmp_path,
    )
    exact = load_file(tmp_path / "out" / "model.safetensors")[name]
    rows = before.mT.reshape(-1, before.shape[1])
    assert torch.equal(exact[changed], after[changed])
    assert torch.equal(exact[~changed], Format("nf4", rows.shape[1]).rounded(rows).view(before.mT.shape).mT[~changed])
