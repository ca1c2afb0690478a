"""Runs on a quantised base: continued on other numbers of ranks, exported in both meanings, refused where it has none."""

import builders
import pytest
import ranks
import torch
from commands import liftdist, run_command, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.engine.quantisation import Format

TOKENS = torch.arange(3, 60).view(1, -1)
EXPERTS = dict(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48, head_dim=12)


def four_more(made):
    return [made.run_step()["train/loss"] for _ in range(4)], builders.global_digest(made)


def continued(mesh, settings):
    """Losses and state of four steps from the newest checkpoint."""
    return builders.continued(mesh, settings, four_more)


@pytest.mark.parametrize("keeps_base", [False, True])
def test_a_run_continues_to_the_bit_and_on_other_ranks(smollm2, tmp_path, keeps_base):
    """With refreshes before and after; on three ranks one has no expert."""
    model = builders.llama(tmp_path / "model", smollm2, "qwen3_moe", **EXPERTS, num_attention_heads=4)
    settings = builders.config(
        model,
        builders.write_records(tmp_path / "records.jsonl"),
        tmp_path,
        model=dict(base_dtype="nf4"),
        selection=dict(refresh_interval=3),
        train=dict(steps=12, eval_kl=keeps_base),
    )
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 5, four_more)
    assert found == expected
    losses, _ = expected
    others, *_ = ranks.run(3, continued, settings)
    assert others[0] == pytest.approx(losses, rel=1e-4)


def logits(made):
    with torch.no_grad():
        return made.model.eval()(TOKENS).logits


def test_exports_are_onto_the_base_or_as_trained(smollm2, tmp_path):
    base = builders.llama(tmp_path / "base", smollm2, dtype=torch.bfloat16, hidden_size=64, num_attention_heads=4)
    records = builders.write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, base, records, optimizer=dict(lr=0.05))
    asked = "model.dtype=bfloat16", "model.base_dtype=int8"
    run = run_command("train", config, "--nproc", 2, *asked)
    assert run.returncode == 0, run.stdout
    computed, *_ = ranks.run(2, builders.continued, configs.load(config, asked)[0], logits)
    cache = ("--cache-dir", tmp_path / "cache")
    for name in ("hf", "as_trained", "delta"):
        liftdist("export", tmp_path / "run", "--format", name, "--output", tmp_path / name, *cache)
    before, onto, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "hf", "as_trained"))
    number = 0
    for name, weights in before.items():
        if ".layers." not in name or weights.ndim < 2:
            assert torch.equal(trained[name], weights)
            continue
        rounded, changed = Format("int8", weights.shape[1]).rounded(weights), onto[name] != weights
        number += changed.sum()
        assert torch.equal(trained[name][changed], onto[name][changed])
        # a trained weight may have moved back to where it began, and is exact
        same = (trained[name] == rounded) | (trained[name] == weights)
        assert same[~changed].all()
        assert (trained[name] != rounded).sum() <= 0.3 * weights.numel()
    assert number
    liftdist(
        "export", tmp_path / "delta", "--format", "as_trained", "--base", base, "--output", tmp_path / "again", *cache
    )
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "as_trained/model.safetensors"
    ).read_bytes()

    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("as_trained", "hf"))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(TOKENS).logits, computed)
    assert not torch.equal(other(TOKENS).logits, computed)


def selected(mesh, settings):
    """The cache folders of the selections on a base as it is and rounded, and whether they are the same."""
    found = []
    for kind in (None, "nf4"):
        settings.model.base_dtype = kind
        made = builders.trainer(mesh, settings)
        found.append((made.method.selection.name, made.method.principal.indices))
    (one, plain), (other, rounded) = found
    return one, other, all(torch.equal(*pair) for pair in zip(plain, rounded, strict=True))


def test_a_cached_selection_is_of_the_base_as_it_was_rounded(smollm2, tmp_path):
    model = builders.llama(tmp_path / "model", smollm2)
    settings = builders.config(model, builders.write_records(tmp_path / "records.jsonl"), tmp_path)
    ((one, other, are_same),) = ranks.run(1, selected, settings)
    assert one != other
    assert not are_same


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_layers_are_recomputed_and_compiled_as_without(smollm2, tmp_path, setting):
    base = builders.llama(tmp_path / "model", smollm2)
    records = builders.write_records(tmp_path / "records.jsonl")
    losses = []
    for value in (False, True):
        settings = builders.config(
            base, records, tmp_path / str(value), model={"base_dtype": "nf4", setting: value}, train=dict(steps=4)
        )
        ((found, _), *_) = ranks.run(2, begun, settings)
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def begun(mesh, settings):
    return four_more(builders.trainer(mesh, settings))


def test_what_a_quantised_base_is_not_for_is_refused(smollm2, tmp_path):
    base = builders.llama(tmp_path / "base", smollm2)
    records = builders.write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, base, records)
    said = liftdist("train", config, "method=full", "model.base_dtype=int8", code=2)
    assert "model.base_dtype: is for method=lift" in said
    assert "must be one of int8, fp8, nf4" in liftdist("train", config, "model.base_dtype=int4", code=2)
