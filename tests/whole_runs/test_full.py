"""Full fine-tuning on 1, 2, 3 and 2 x 2 ranks against AdamW on one process; continued, exported, refused."""

import json
import shutil
from pathlib import Path

import builders
import commands
import pytest
import ranks
import torch
from reference import DenseFull
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.data.order import BatchOrder
from liftdist.errors import UserError
from liftdist.methods import full
from liftdist.models import build
from liftdist.training.inputs import prepare_inputs

STEPS = 5
WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "2x2": (4, 2)}
KINDS = {
    "float32": dict(),
    "masters": dict(model=dict(dtype="bfloat16")),
    "bfloat16": dict(model=dict(dtype="bfloat16"), optimizer=dict(dtype="bfloat16")),
    "experts": dict(),
}
SIZES = {
    "experts": dict(
        model_type="qwen3_moe",
        tie_word_embeddings=False,
        hidden_size=48,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}


def settings_of(kind, folder):
    made = builders.config(
        Path(folder) / kind,
        Path(folder) / "records.jsonl",
        Path(folder) / f"run-{kind}",
        train=dict(steps=STEPS, batch_size=6, micro_batch_size=2, seed=3),
        optimizer=dict(lr=5e-3, weight_decay=0.1, max_grad_norm=1.0) | KINDS[kind].get("optimizer", {}),
        model=KINDS[kind].get("model", {}),
    )
    made.method = "full"
    return made


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model of each kind, with a tokenizer, and records."""
    made = tmp_path_factory.mktemp("full")
    builders.write_records(made / "records.jsonl")
    for kind in KINDS:
        builders.llama(made / kind, tiny_model, **SIZES.get(kind, {}))
    return made


def run(mesh, folder, kinds):
    found = {}
    for kind in kinds:
        trainer = builders.trainer(mesh, settings_of(kind, folder))
        losses = [trainer.run_step()["train/loss"] for _ in range(STEPS)]
        weights = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in build.tensors(trainer.model).items()
        }
        states = trainer.method.optimizer.state.values()
        held = sum(state.nbytes for values in states for key, state in values.items() if key != "step")
        found[kind] = losses, weights, held
    return found


@pytest.fixture(scope="module")
def references(folder):
    found = {}
    for kind in KINDS:
        settings = settings_of(kind, folder)
        inputs = prepare_inputs(settings, Console(False))
        model = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=getattr(torch, settings.model.dtype))
        names = [name for name, _ in model.named_parameters() if not name.endswith("mlp.gate.weight")]
        lrs = [5e-3 * (STEPS - step) / STEPS for step in range(STEPS)]
        dtype = getattr(torch, settings.optimizer.dtype)
        dense = DenseFull(model, names, lrs, (0.9, 0.95), 1e-6, 0.1, 1.0, dtype)
        order = BatchOrder(inputs.samples.lengths, 3, False, 64, 6)
        losses = []
        for step in range(STEPS):
            rows = [inputs.samples.table[sample] for sequence in order.batch(6 * step) for sample in sequence]
            losses.append(dense.run_step([(row["input_ids"], row["labels"]) for row in rows]))
        found[kind] = losses, dict(model.named_parameters()) | dense.masters
    return found


@pytest.mark.parametrize("world", ["1", "2", pytest.param("3", marks=pytest.mark.slow), "2x2"])
def test_it_is_adamw(world, folder, references):
    size, replicas = WORLDS[world]
    first, *others = ranks.run(size, run, folder, list(KINDS), dp_replicate=replicas)
    for kind, (losses, weights, _) in first.items():
        expected, theirs = references[kind]
        rounded = KINDS[kind].get("model")
        assert losses == pytest.approx(expected, rel=2e-2 if rounded else 1e-5), kind
        assert losses[-1] < losses[0] - 0.5
        for name, weight in weights.items():
            difference = (weight - theirs[name]).double().norm() / theirs[name].double().norm()
            assert difference < (2e-2 if rounded else 2e-4), (kind, name)
    for other in others:
        assert all(other[kind][0] == first[kind][0] for kind in KINDS)
    for kind, element in (("float32", 4), ("masters", 4), ("bfloat16", 2)):  # moments, sharded
        shares = [rank[kind][2] for rank in (first, *others)[: size // replicas]]
        assert sum(shares) == 2 * element * sum(weight.numel() for weight in first[kind][1].values())
        assert max(shares) <= 1.1 * sum(shares) / len(shares)


def three_more(made):
    """The state, and after two steps more with the loss of a third."""
    saved = builders.global_digest(made)
    for _ in range(2):
        made.run_step()
    return saved, builders.global_digest(made), made.run_step()["train/loss"]


@pytest.mark.parametrize(
    ("kind", "size", "replicas"),
    [("masters", 3, 1), pytest.param("masters", 4, 2, marks=pytest.mark.slow), ("experts", 1, 1)],
)
def test_it_continues_to_the_bit_and_from_the_same_state_on_other_ranks(kind, size, replicas, folder, tmp_path):
    settings = settings_of(kind, folder)
    settings.run_dir = str(tmp_path / "run")
    (expected, found), *_ = ranks.run(2, builders.stop_and_continue, settings, 2, three_more)
    assert found == expected
    loaded, _, near = ranks.run(size, builders.continued, settings, three_more, dp_replicate=replicas)[0]
    assert loaded == expected[0]
    assert near == pytest.approx(expected[2], rel=1e-2)


def run_and_load(mesh, settings, text):
    """A whole run with its export; what its last checkpoint holds. Collective."""
    ended = builders.run_once(mesh, settings, text)
    run_dir = Path(settings.run_dir)
    made = builders.trainer(mesh, settings, builders.newest(mesh, run_dir, builders.accepted_in(run_dir)))
    return ended, {name: param.full_tensor().detach().clone() for name, param in made.model.named_parameters()}


@pytest.mark.parametrize("kind", ["float32", "masters", "experts"])
def test_exports_hold_what_was_trained(kind, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / kind, base)
    if kind == "float32":  # as some tools do, store the tied head as well
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    settings = settings_of(kind, folder)
    settings.run_dir, settings.model.path = str(tmp_path / "run"), str(base)
    text = json.dumps({"method": "full", "model": {"path": str(base), "dtype": settings.model.dtype}})
    ended, weights = ranks.run(2, run_and_load, settings, text)[0]
    assert ended == "finished"
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run/export/model.safetensors")
    assert before.keys() == after.keys()
    dtype = getattr(torch, settings.model.dtype)
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        assert tensor.shape == before[name].shape
        assert torch.equal(tensor, before[name].to(dtype)) == name.endswith("mlp.gate.weight"), name  # a router
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", dtype=dtype)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, param in model.named_parameters():
        assert torch.equal(param, weights[name].to(dtype)), name
    if kind == "float32":
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    code, said = commands.call("export", tmp_path / "run", "--output", tmp_path / "full.delta", "--format", "delta")
    assert code == 0, said
    code, said = commands.call("apply", tmp_path / "full.delta", base, "--output", tmp_path / "applied")
    assert code == 0, said
    again = load_file(tmp_path / "applied/model.safetensors")
    assert all(torch.equal(tensor.to(dtype), after[name]) for name, tensor in again.items())


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["optimizer.name=sgd"], "optimizer.name: must be adamw with method=full"),
        (["optimizer.device=cpu"], "optimizer.device: is for method=lift: method=full trains weights where the model is"),
        (["optimizer.bias_correction=entry"], "optimizer.bias_correction: must be step with method=full"),
        (["train.loss=asft"], "train.loss: needs the values of the base model, which method=full does not keep"),
        (["train.eval_kl=true", "data.eval_share=0.1"], "train.eval_kl: needs the values of the base model"),
        (["optimizer.decay_towards=base", "optimizer.weight_decay=0.1"], "optimizer.decay_towards: needs the values"),
        (["method=ful"], "did you mean full"),
    ],
)  # fmt: skip
def test_settings_that_it_has_not_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmethod: full\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)


def test_as_a_user_runs_it(tiny_model, records, tmp_path):
    config = commands.write_config(tmp_path, tiny_model, records)
    train = ("train", config, "method=full", 'selection.modules=["*.layers.*"]', "checkpoint.interval=2")
    run = commands.run_command(*train, environment={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout
    assert "not used by method=full: selection.density=0.05, selection.filter_rank=4" in run.stdout
    before, after = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "run/export/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers." in name}
    code, refused = commands.call("train", config, "--allow-state-changes")
    assert code == 2
    assert "method: full -> lift: cannot be changed" in refused
    wider = commands.run_command(*train, 'selection.modules=["*"]', "train.steps=7", "--allow-state-changes")
    assert "continuing after step 5 of 7" in wider.stdout, wider.stdout
    later = load_file(tmp_path / "run/export/model.safetensors")
    assert not any(torch.equal(before[name], later[name]) for name in before)
    refused = commands.user_error(commands.run_command(*train, "train.steps=9", "--allow-state-changes"))
    assert "which is not trained now; its weights would be lost" in refused


def test_modules_are_those_that_fit(tmp_path):
    config = builders.config(tmp_path, tmp_path, tmp_path)
    model = builders.frozen_model(tmp_path, **SIZES["experts"])
    every = dict(model.named_parameters())
    assert every.keys() - full.places(config, model).keys() == {
        name for name in every if name.endswith("mlp.gate.weight")
    }
    config.selection.modules = ["*.experts", "*norm*"]
    assert full.places(config, model).keys() == {name for name in every if "norm" in name or ".experts." in name}
    config.selection.modules = ["*.experts", "*.nothing"]
    with pytest.raises(
        UserError, match=r"selection.modules: no module with parameters fits \*.nothing; one is named model.emb"
    ):
        full.places(config, model)
