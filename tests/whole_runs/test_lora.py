"""LoRA and its variants on 1, 2 and 2 x 2 ranks against peft on one process; continued, exported, refused."""

import dataclasses
import json
from pathlib import Path

import builders
import commands
import hooks
import peft
import pytest
import ranks
import torch
from reference import DenseFull
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.data.order import BatchOrder
from liftdist.errors import UserError
from liftdist.models import adapters
from liftdist.runs.saver import Checkpointer
from liftdist.training.inputs import prepare_inputs

STEPS = 4
WORLDS = {"1": (1, 1), "2": (2, 1), "2x2": (4, 2)}
KINDS = {  # settings of the run, and what peft calls them
    "lora": (dict(alpha=16), dict(lora_alpha=16)),
    "one": (dict(rank=1), dict(r=1)),  # a row for one rank, and none for the other
    "chosen": (dict(modules=["*.q_proj", "*.down_proj"]), dict(target_modules=["q_proj", "down_proj"])),
    "rslora": (dict(variant="rslora", alpha=4), dict(use_rslora=True, lora_alpha=4)),
    "dora": (dict(variant="dora"), dict(use_dora=True)),
    "pissa": (dict(variant="pissa"), dict(init_lora_weights="pissa")),
    "transposed dora": (dict(variant="dora"), dict(use_dora=True, fan_in_fan_out=True)),
    "transposed pissa": (dict(variant="pissa"), dict(init_lora_weights="pissa", fan_in_fan_out=True)),
    "bfloat16": (dict(), dict()),
    "bfloat16 dora": (dict(variant="dora"), dict(use_dora=True)),
    "bfloat16 pissa": (dict(variant="pissa"), dict(init_lora_weights="pissa")),
    "bfloat16 values": (dict(), dict()),
    "experts": (dict(), dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
MODELS = {
    "llama": {},
    "transposed": dict(model_type="gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "experts": dict(
        model_type="qwen3_moe",
        hidden_size=48,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
}


def model_of(kind):
    return next((name for name in MODELS if kind.startswith(name)), "llama")


def values_of(kind):
    """The dtype of adapters and moments."""
    return "bfloat16" if kind == "bfloat16 values" else "float32"


def settings_of(kind, folder, **lora):
    made = builders.config(
        Path(folder) / model_of(kind),
        Path(folder) / "records.jsonl",
        Path(folder) / f"run-{kind}",
        model=dict(dtype="bfloat16" if "bfloat16" in kind else "float32", activation_checkpointing=kind == "rslora"),
        train=dict(steps=STEPS, batch_size=6, micro_batch_size=2, seed=3),
        optimizer=dict(lr=5e-3, weight_decay=0.1, max_grad_norm=1.0, dtype=values_of(kind)),
        lora=dict(rank=3) | KINDS[kind][0] | lora,
    )
    made.method = "lora"
    return made


def text_of(settings):
    """The settings that an export reads."""
    model = {"path": settings.model.path, "dtype": settings.model.dtype}
    return json.dumps({"method": "lora", "model": model, "lora": dataclasses.asdict(settings.lora)})


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A model of each architecture, with a tokenizer, and records."""
    made = tmp_path_factory.mktemp("lora")
    builders.write_records(made / "records.jsonl")
    for name, sizes in MODELS.items():
        builders.llama(made / name, tiny_model, **sizes)
    return made


def weights_of(model):
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def run(mesh, folder, kinds):
    found = {}
    for kind in kinds:
        trainer = builders.trainer(mesh, settings_of(kind, folder))
        before = weights_of(trainer.model)
        losses = [trainer.run_step()["train/loss"] for _ in range(STEPS)]
        held = sum(state.numel() for values in trainer.method.optimizer.state.values() for state in values.values())
        found[kind] = losses, before, weights_of(trainer.model), held
    return found


@pytest.fixture(scope="module")
def runs(folder):
    return {
        world: ranks.run(size, run, folder, kinds_on(world), dp_replicate=replicas)
        for world, (size, replicas) in WORLDS.items()
    }


def kinds_on(world):
    return [kind for kind in KINDS if world != "2x2" or kind in ("one", "bfloat16 dora", "transposed pissa")]


def peft_model(kind, folder, **others):
    settings = settings_of(kind, folder)
    model = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=getattr(torch, settings.model.dtype))
    targets = GPT2 if "transposed" in kind else LLAMA
    given = dict(r=3, lora_alpha=8, target_modules=targets) | KINDS[kind][1] | others
    return peft.inject_adapter_in_model(peft.LoraConfig(**given), model)


def is_adapter(name):
    return ".lora_" in name


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_are_those_of_peft_and_the_same_on_any_ranks(kind, folder, runs):
    before = runs["1"][0][kind][1]
    for world in WORLDS:
        for rank in runs[world] if kind in kinds_on(world) else ():
            assert rank[kind][1].keys() == before.keys()
            assert all(torch.equal(rank[kind][1][name], weight) for name, weight in before.items())
    theirs = dict(peft_model(kind, folder).named_parameters())
    assert before.keys() == theirs.keys()
    for name, weight in before.items():
        if not is_adapter(name):  # of the base, or what PiSSA left of it
            tolerance = 2**-8 if "bfloat16 pissa" in kind else 1e-5 if "pissa" in kind else 0
            torch.testing.assert_close(weight, theirs[name], rtol=tolerance, atol=tolerance * weight.abs().max())
        elif "pissa" in kind or "magnitude" in name:
            difference = (weight - theirs[name].float()).norm() / theirs[name].float().norm()
            assert difference < (1e-2 if "bfloat16" in kind else 1e-5), name  # in bfloat16 peft rounds the values
        elif "lora_B" in name:
            assert not weight.any()
        else:
            bound = weight.shape[1] ** -0.5
            assert bound * 0.7 < weight.abs().max() <= bound * (1 + 2**-8)
            assert not torch.equal(weight, next(w for n, w in before.items() if "lora_A" in n and n != name))


@pytest.fixture(scope="module")
def references(folder, runs):
    """The same steps by peft on one process, from the same adapters."""
    found = {}
    for kind in KINDS:
        settings = settings_of(kind, folder)
        inputs = prepare_inputs(settings, Console(False))
        model = peft_model(kind, folder).to(getattr(torch, settings.model.dtype))
        names = [name for name in runs["1"][0][kind][1] if is_adapter(name)]
        assert names == [name for name, param in model.named_parameters() if param.requires_grad]
        lrs = [5e-3 * (STEPS - step) / STEPS for step in range(STEPS)]
        reference = DenseFull(model, names, lrs, (0.9, 0.95), 1e-6, 0.1, 1.0, getattr(torch, values_of(kind)))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(runs["1"][0][kind][1][name])
                if name in names:
                    reference.masters[name].copy_(runs["1"][0][kind][1][name])
        order = BatchOrder(inputs.samples.lengths, 3, False, 64, 6)
        losses = []
        for step in range(STEPS):
            rows = [inputs.samples.table[sample] for sequence in order.batch(6 * step) for sample in sequence]
            losses.append(reference.run_step([(row["input_ids"], row["labels"]) for row in rows]))
        found[kind] = losses, reference.masters
    return found


@pytest.mark.parametrize(("world", "kind"), [(world, kind) for world in WORLDS for kind in kinds_on(world)])
def test_it_is_peft(world, kind, runs, references):
    first, *others = runs[world]
    losses, before, after, _ = first[kind]
    expected, masters = references[kind]
    low = "bfloat16" in kind
    assert losses == pytest.approx(expected, rel=2e-2 if low else 1e-5)
    for name, weight in after.items():
        if is_adapter(name):
            difference = (weight - masters[name]).norm() / masters[name].norm()
            assert difference < (0.15 if low else 1e-3), name
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[name]), name
    assert all(other[kind][0] == losses for other in others)
    trained = sum(weight.numel() for weight in masters.values())
    replicas = WORLDS[world][1]
    moments = sum(rank[kind][3] - steps_in(rank[kind]) for rank in runs[world])
    assert moments == 2 * trained * replicas  # nothing of the base, and nothing twice


def steps_in(found):
    """Step counts of the optimizer, one for each parameter."""
    return sum(is_adapter(name) for name in found[1])


CONTINUED = ("one", "bfloat16 dora", "transposed pissa")


def stopped_after_two(mesh, folder):
    """Of each kind the state at a save, and after two steps more with the loss of a third, and the base weights."""
    found = []
    for kind in CONTINUED:
        settings = settings_of(kind, folder, dropout=0.1)
        made = builders.trainer(mesh, settings)
        checkpointer = Checkpointer(builders.claimed_by_all(mesh, Path(settings.run_dir)), mesh, 1, None)
        for _ in range(2):
            made.run_step()
        assert builders.save(made, checkpointer).bytes > 0
        found.append([builders.global_digest(made), *after_two(made)])
    return found


def continued(mesh, folder):
    found = []
    for kind in CONTINUED:
        settings = settings_of(kind, folder, dropout=0.1)
        run_dir = Path(settings.run_dir)
        made = builders.trainer(mesh, settings, builders.newest(mesh, run_dir, builders.accepted_in(run_dir)))
        found.append([builders.global_digest(made), *after_two(made)])
    return found


def after_two(made):
    base = {name: weight for name, weight in weights_of(made.model).items() if not is_adapter(name)}
    for _ in range(2):
        made.run_step()
    return builders.global_digest(made), made.run_step()["train/loss"], base


def test_it_continues_to_the_bit_and_from_the_same_state_on_other_ranks(folder):
    first = ranks.run(2, stopped_after_two, folder)[0]
    for expected, found in zip(first, ranks.run(2, continued, folder)[0], strict=True):
        assert found[:3] == expected[:3]
    for size in (1, 3):
        for expected, (loaded, _, near, base) in zip(first, ranks.run(size, continued, folder)[0], strict=True):
            assert loaded == expected[0]
            assert near == pytest.approx(expected[2], rel=5e-2)  # with other random numbers in dropout
            assert all(torch.equal(weight, expected[3][name]) for name, weight in base.items())


TOKENS = torch.arange(40, 60).view(2, 10)
EXPORTED = ("chosen", "rslora", "dora", "pissa", "transposed dora", "transposed pissa", "bfloat16")


def run_and_predict(mesh, folder, target):
    """Of each kind a whole run with its export; the logits of the model that its last checkpoint holds, and without adapters."""
    found = []
    for kind in EXPORTED:
        settings = settings_of(kind, folder)
        settings.run_dir = str(target / kind)
        ended = builders.run_once(mesh, settings, text_of(settings))
        accepted = builders.accepted_in(target / kind)
        made = builders.trainer(mesh, settings, builders.newest(mesh, target / kind, accepted))
        made.model.eval()
        with torch.no_grad():
            logits = made.model(input_ids=TOKENS).logits
            with made.method.at_base():
                base = made.model(input_ids=TOKENS).logits
        found.append((ended, logits, base))
    return found


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("finished")
    return target, dict(zip(EXPORTED, ranks.run(2, run_and_predict, folder, target)[0], strict=True))


@pytest.mark.parametrize("kind", EXPORTED)
def test_exports_hold_what_was_trained(kind, folder, finished, tmp_path):
    runs, found = finished
    settings, (ended, logits, base) = settings_of(kind, folder), found[kind]
    assert ended == "finished"
    dtype = getattr(torch, settings.model.dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    plain = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=dtype)
    with torch.no_grad():
        before = plain(input_ids=TOKENS).logits
    assert (logits - before).abs().max() > 1e-2
    if "pissa" not in kind:
        assert torch.equal(base, before)

    said = commands.liftdist("export", runs / kind, "--format", "peft", "--output", tmp_path / "adapter")
    assert str(tmp_path / "adapter") in said
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, logits, rtol=tolerance, atol=tolerance)
    given = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    twice = 2 if "pissa" in kind else 1
    assert (given["r"], given["lora_alpha"]) == (twice * settings.lora.rank, twice * settings.lora.alpha)
    targets = KINDS[kind][1].get("target_modules", GPT2 if "transposed" in kind else LLAMA)
    assert set(given["target_modules"]) == set(targets)

    before, after = (load_file(at / "model.safetensors") for at in (folder / model_of(kind), runs / kind / "export"))
    assert before.keys() == after.keys()
    merged = loaded.float().merge_and_unload().state_dict()  # peft's, of the base weights as they were loaded
    changed = 0
    for name, tensor in after.items():
        assert (tensor.shape, tensor.dtype) == (before[name].shape, dtype)
        theirs = merged[name if name in merged else f"transformer.{name}"].to(dtype)
        torch.testing.assert_close(tensor, theirs, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, before[name].to(dtype))
    assert changed == len(load_file(tmp_path / "adapter/adapter_model.safetensors")) // (3 if "dora" in kind else 2)

    for format in ("delta", "shira", "patch"):
        code, said = commands.call("export", runs / kind, "--format", format, "--output", tmp_path / "other")
        assert code == 2
        assert f"--format {format}: holds changed weights one by one" in said


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["lora.variant=adalora"], "lora.variant: must be one of lora, dora, rslora, pissa: adalora moves rank"),
        (["lora.variant=dor"], "did you mean dora"),
        (["lora.pissa_niter=4"], "lora.pissa_niter: is used by lora.variant=pissa alone"),
        (["lora.rank=0"], "lora.rank: must be at least 1"),
        (["lora.modules=[a]", "selection.modules=[b]"], "lora.modules: is given, and selection.modules, too"),
        (["optimizer.name=sgd"], "optimizer.name: must be adamw with method=lora"),
        (["train.loss=asft", "lora.variant=pissa"], "train.loss: needs the values of the base model, which lora.variant=pissa"),
        (["optimizer.decay_towards=base", "optimizer.weight_decay=0.1"], "optimizer.decay_towards: must be zero with"),
    ],
)  # fmt: skip
def test_settings_that_it_has_not_are_refused(overrides, problem, tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: r\nmethod: lora\nmodel: {path: m}\ndata: {path: d}\n")
    with pytest.raises(UserError) as caught:
        configs.load(tmp_path / "config.yaml", overrides)
    assert problem in str(caught.value)


def test_as_a_user_runs_it(folder, records, tmp_path):
    config = commands.write_config(tmp_path, folder / "experts", records)
    train = ("train", config, "method=lora", "lora.rank=4", "checkpoint.interval=2", "train.eval_kl=true")
    run = commands.run_command(*train, environment={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout
    assert "not used by method=lora: selection.density=0.05, selection.filter_rank=4" in run.stdout
    assert "without adapters: 30 matrices of experts" in run.stdout
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    divergence = [line[tag] for line in metrics for tag in line if "kl_to_base" in tag]
    assert divergence[0] == 0  # B is zero
    assert divergence[-1] > 0
    before, after = (
        load_file(folder / "experts/model.safetensors"),
        load_file(tmp_path / "run/export/model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "self_attn" in name and "norm" not in name}
    refused = commands.user_error(
        commands.run_command(*train, "lora.rank=8", "lora.variant=dora", "lora.alpha=9", "--allow-state-changes")
    )
    assert "lora.rank: 4 -> 8; lora.alpha: 8 -> 9; lora.variant: lora -> dora: cannot be changed" in refused


def packed(mesh, folder):
    """Without values, adapters would be what memory holds when the run tries out whether packing leaks."""
    found = []
    for variant in ("lora", "dora"):
        settings = settings_of("lora", folder, variant=variant)
        settings.data.packing = True
        with hooks.around(adapters, "inject", after=lambda _, model, *others: fill(model)):
            made = builders.trainer(mesh, settings)
        found.append((hasattr(made.model, "chunked_loss"), made.run_step()["train/loss"]))
    return found


def fill(model):
    """Let parameters that get memory later hold NaN, as what they are made of may."""
    to_empty = model.to_empty

    def and_fill(**options):
        to_empty(**options)
        for param in adapters.parameters(model).values():
            param.data.fill_(float("nan"))

    model.to_empty = and_fill


def test_trials_before_the_first_step_are_those_of_the_base_model(folder):
    (first, second), *_ = ranks.run(2, packed, folder)
    assert first == second == (True, pytest.approx(first[1]))
