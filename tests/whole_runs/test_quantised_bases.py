"""Runs on a base that comes quantised: as on the weights that it stands for, continued, exported, applied."""

import json

import builders
import pytest
import quantised_folders
import ranks
import torch
from commands import liftdist, run_command, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist.deltas import delta as deltas
from liftdist.deltas.formats import hf
from liftdist.errors import UserError
from liftdist.models.weights import ModelFolder
from liftdist.serving import launch

SIZES = {
    "gpt_oss": dict(hidden_size=64, intermediate_size=96, num_local_experts=3, num_experts_per_tok=2),
    "llama": dict(hidden_size=60, intermediate_size=186),
}


def three_more(made):
    return [made.run_step()["train/loss"] for _ in range(3)], builders.global_digest(made)


def continued_and_plain(mesh, quantised, plain):
    """What follows four steps, in one go and from a checkpoint, and on the plain folder. Collective."""
    return [builders.stop_and_continue(mesh, settings, 4, three_more) for settings in (quantised, plain)]


@pytest.mark.parametrize(
    ("kind", "quantise", "base_dtype"),
    [
        pytest.param("gpt_oss", quantised_folders.mxfp4, None, id="mxfp4"),
        pytest.param(
            "llama",
            lambda folder: quantised_folders.fp8(folder, (40, 24)),
            "nf4",
            id="fp8 rounded to nf4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_is_to_the_bit_that_on_the_weights_that_are_meant(kind, quantise, base_dtype, smollm2, tmp_path):
    """With a refresh before and after it is continued, which on a rounded base reads the files again."""
    base = builders.llama(tmp_path / "base", smollm2, kind, dtype=torch.bfloat16, **SIZES[kind])
    quantise(base)
    plain = tmp_path / "plain"
    hf.write(deltas.Delta(base, "", [], lambda _: pytest.fail("nothing changed")), base, plain)
    records = builders.write_records(tmp_path / "records.jsonl")
    of_each = []
    for folder in (base, plain):
        (tmp_path / f"of-{folder.name}").mkdir()
        sections = dict(model=dict(base_dtype=base_dtype), selection=dict(refresh_interval=3), train=dict(steps=9))
        of_each.append(builders.config(folder, records, tmp_path / f"of-{folder.name}", **sections))
    (of_quantised, of_plain), _ = ranks.run(2, continued_and_plain, *of_each)
    assert of_quantised[0] == of_quantised[1] == of_plain[0] == of_plain[1]


def test_a_run_is_continued_exported_and_applied(smollm2, tmp_path):
    base = builders.llama(tmp_path / "base", smollm2, "gpt_oss", dtype=torch.bfloat16, **SIZES["gpt_oss"])
    meant = quantised_folders.mxfp4(base)
    config = write_config(tmp_path, base, builders.write_records(tmp_path / "records.jsonl"))
    train = ("train", config, "--nproc", 2, "data.eval_path=", "optimizer.lr=0.05", "model.dtype=bfloat16")
    first = run_command(*train, "train.steps=3", "train.export=false")
    assert first.returncode == 0, first.stdout
    assert (
        "the base model's weights come quantised (mxfp4): they are read as those that they stand for, onto"
        in first.stdout
    )
    second = run_command(*train, "--allow-state-changes")
    assert second.returncode == 0, second.stdout
    assert "step 3" in second.stdout

    run, at = tmp_path / "run", ("--cache-dir", tmp_path / "cache")
    exported, stored = load_file(run / "export/model.safetensors"), load_file(base / "model.safetensors")
    assert set(exported) == set(ModelFolder(base).file_of)
    begun = {name: meant[name] if name in meant else stored[name] for name in exported}
    changed = {name: exported[name] != weights for name, weights in begun.items()}
    trained = {name for name, where in changed.items() if where.any()}
    assert trained > set(meant)
    assert all(changed[name].float().mean() < 0.2 for name in trained)
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype="auto")
    assert all(torch.equal(weights, exported[name]) for name, weights in model.state_dict().items() if name in exported)
    assert "quantization_config" not in json.loads((run / "export/config.json").read_text())

    delta, applied = tmp_path / "delta", tmp_path / "applied"
    liftdist("export", run, "--format", "delta", "--output", delta, *at)
    liftdist("apply", delta, base, "--output", applied, *at)
    assert "quantization_config" not in json.loads((applied / "config.json").read_text())
    found = load_file(applied / "model.safetensors")
    assert set(found) == set(exported)
    assert all(torch.equal(found[name], weights) for name, weights in exported.items())
    liftdist("apply", delta, applied, "--undo", *at)
    undone = load_file(applied / "model.safetensors")
    assert all(torch.equal(undone[name], weights) for name, weights in begun.items())
    liftdist("apply", delta, applied, *at)  # for which the delta is, too

    refused = liftdist("apply", delta, base, *at, code=2)
    assert "holds quantised weights, which cannot hold what a delta changes; give --output" in refused
    refused = liftdist("export", run, "--format", "sglang", "--output", tmp_path / "versions", *at, code=2)
    assert "the format sglang changes the bytes of the base model's own files; use hf" in refused
    follow = ("follow", tmp_path, "--base", base, "--output", tmp_path / "versions")
    assert "the format sglang changes the bytes" in liftdist(*follow, "--format", "sglang", "--once", *at, code=2)
    with pytest.raises(UserError, match="holds quantised weights, to which no delta applies in an engine"):
        launch.check_deltas(str(base), [f"one={delta}"], tmp_path / "cache")

    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scales"))
    tensors[name][0, 0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert "is not the base model of" in liftdist("apply", delta, base, "--output", tmp_path / "other", *at, code=2)


def test_a_plan_is_that_of_the_weights_that_are_meant(smollm2, tmp_path):
    base = builders.llama(tmp_path / "base", smollm2, "gpt_oss", dtype=torch.bfloat16, **SIZES["gpt_oss"])
    config = write_config(tmp_path, base, builders.write_records(tmp_path / "records.jsonl"))
    before = liftdist("plan", config, "--gpus-per-node", 2)
    quantised_folders.mxfp4(base)
    assert liftdist("plan", config, "--gpus-per-node", 2) == before
