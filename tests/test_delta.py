"""The delta: exact to the bit both ways, small, refused where it does not fit, and read by other software."""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from test_data import write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftdist import cli, safetensors_io
from liftdist.deltas import codec, of_run
from liftdist.deltas import file as delta_file
from liftdist.deltas import folder as model_folders
from liftdist.deltas.export import export
from liftdist.deltas.module import change_module
from liftdist.errors import UserError
from liftdist.models import check, weights
from liftdist.models.load import load
from liftdist.runs import claims, saver
from liftdist.schema import ModelConfig


def changed_copy(folder, target, seed=0, share=0.05):
    """A copy of a model folder with other values at a share of the places of every linear weight."""
    shutil.copytree(folder, target)
    chance = torch.Generator().manual_seed(seed)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "_proj" in name:
                flat = tensor.view(-1)
                places = torch.randperm(flat.numel(), generator=chance)[: round(share * flat.numel())]
                flat[places] = (flat[places].float() * 1.5 + 0.01).to(flat.dtype)
        save_file(tensors, file, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm2):
    """A bf16 model in several files, and two others that were made from it."""
    folder = tmp_path_factory.mktemp("models")
    base = builders.llama(
        folder / "base",
        smollm2,
        dtype=torch.bfloat16,
        hidden_size=100,
        intermediate_size=203,
        num_key_value_heads=5,
        head_dim=20,
    )
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="9MB")
    (base / "model.safetensors").unlink()
    assert (base / check.INDEX).exists()
    (base / "notes").mkdir()
    (base / "notes" / "readme.md").write_text("kept")
    return base, changed_copy(base, folder / "one", 1), changed_copy(base, folder / "two", 2)


@pytest.fixture(scope="module")
def deltas(folders, tmp_path_factory):
    """Deltas of the two changed models, by the command."""
    folder = tmp_path_factory.mktemp("deltas")
    for number, name in ((1, "one"), (2, "two")):
        liftdist("diff", folders[0], folders[number], "--output", folder / name, "--cache-dir", folder / "cache")
    return folder / "one", folder / "two", folder / "cache"


def liftdist(*arguments, code=0):
    """A command, run here; returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main([*map(str, arguments)])
            ended = 0
        except SystemExit as end:
            ended = end.code
    assert ended == code, said.getvalue()
    return said.getvalue()


def contents(folder):
    """Every file of a folder; weights by tensor."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            found |= {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(path).items() if t.ndim}
        else:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The file.


@pytest.mark.parametrize("indices", [
    [], [0], [127], [128], [2**31 + 5], [0, 1, 2, 3], [5, 132, 133, 16_517, 2**35, 2**35 + 127, 2**62],
    np.cumsum(np.random.default_rng(0).geometric(0.01, 5000)).tolist(),
])  # fmt: skip
def test_gaps_hold_any_ascending_indices(indices):
    coded = codec.encode(torch.tensor(indices, dtype=torch.int64))
    assert coded.dtype == torch.uint8
    assert coded.numel() % 8 == 0
    assert codec.decode(coded, len(indices)).tolist() == indices


def test_a_changed_weight_costs_about_five_bytes(folders, deltas, tmp_path):
    weights_changed = sum(
        delta_file.read(deltas[0]).get(name).indices.numel() for name in delta_file.read(deltas[0]).names
    )
    assert weights_changed > 5000
    overhead = 4000  # names and offsets of 14 matrices
    assert (deltas[0].stat().st_size - overhead) / weights_changed <= 6.4
    liftdist("diff", *folders[:2], "--output", tmp_path / "slim", "--cache-dir", deltas[2], "--without-base")
    assert ((tmp_path / "slim").stat().st_size - overhead) / weights_changed <= 4.4
    out = tmp_path / "out"
    liftdist("apply", tmp_path / "slim", folders[0], "--output", out, "--cache-dir", deltas[2])
    assert contents(out) == contents(folders[1])
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    said = liftdist("apply", tmp_path / "slim", copy, "--cache-dir", deltas[2], code=2)
    assert "holds no base values, so this could not be taken back" in said
    assert "give --output" in said
    assert "cannot be undone" in liftdist("apply", tmp_path / "slim", out, "--undo", "--cache-dir", deltas[2], code=2)


def rewrite(path, target, metadata=None, **tensors):
    """A delta with other tensors or metadata, and the hash that goes with them."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        about, kept = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept |= tensors
    about |= {"sha256": safetensors_io.digest_of(sorted(kept.items()))} | (metadata or {})
    save_file(kept, target, about)
    return target


def test_what_is_wrong_with_a_delta_is_found_before_anything_is_written(folders, deltas, tmp_path):
    one, _, cache = deltas
    base = shutil.copytree(folders[0], tmp_path / "model")
    before = contents(base)
    name = "model.layers.1.mlp.up_proj.weight"
    change = delta_file.read(one).get(name)
    values = change.values.clone()
    values[3] = torch.nan
    beyond = change.indices.clone()
    beyond[-1] = 100 * 203
    twice = codec.encode(change.indices)
    twice[1] = 0
    (tmp_path / "short").write_bytes(one.read_bytes()[:-1])
    (tmp_path / "empty").touch()
    flipped = bytearray(one.read_bytes())
    flipped[-100] ^= 4
    (tmp_path / "flipped").write_bytes(flipped)
    about = json.loads(safe_metadata(one)["tensors"])
    other_shape = {"tensors": json.dumps(about | {name: about[name] | {"shape": [100, 203]}})}
    renamed = {"tensors": json.dumps({key.replace("layers.1", "layers.7"): value for key, value in about.items()})}
    one_name = f"{name}.gaps"
    for problem, path in (
        ("not a safetensors file|damaged|cut short", folders[0] / check.INDEX),
        ("No such file", tmp_path / "none"),
        ("is empty or cut short", tmp_path / "empty"),
        ("is another kind of safetensors file, not a delta", next(folders[0].glob("*.safetensors"))),
        ("short has", tmp_path / "short"),
        ("do not have the hash", tmp_path / "flipped"),
        ("not finite", rewrite(one, tmp_path / "nan", **{f"{name}.values": values})),
        ("out of range", rewrite(one, tmp_path / "beyond", **{one_name: codec.encode(beyond)})),
        ("do not ascend", rewrite(one, tmp_path / "twice", **{one_name: twice})),
        (
            "number of indices|values for",
            rewrite(one, tmp_path / "few", **{one_name: codec.encode(change.indices[:-9])}),
        ),
        ("the delta is for", rewrite(one, tmp_path / "shape", other_shape)),
        ("damaged|layers.7", rewrite(one, tmp_path / "name", renamed)),
        ("is another model than the base", rewrite(one, tmp_path / "base", {"base": "0" * 64})),
    ):
        said = liftdist("apply", path, base, "--cache-dir", cache, code=2)
        assert any(part in said for part in problem.split("|")), (problem, said)
        assert len(said.splitlines()) == 1, said
        assert contents(base) == before
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def safe_metadata(path):
    return safetensors_io.header(path)["__metadata__"]


# ---------------------------------------------------------------------------------------------------------------------
# Apply, undo, swap.


def test_apply_undo_and_swap_on_a_folder_are_exact(folders, deltas, tmp_path):
    base, first, second = folders
    one, two, cache = deltas
    folder = shutil.copytree(base, tmp_path / "model")
    at = ("--cache-dir", cache)
    liftdist("apply", one, folder, *at)
    assert contents(folder) == contents(first)
    assert "does not hold the new values of the delta" in liftdist("apply", two, folder, "--undo", *at, code=2)
    assert contents(folder) == contents(first)
    liftdist("apply", two, folder, "--instead-of", one, *at)
    assert contents(folder) == contents(second)
    liftdist("apply", two, folder, "--undo", "--output", tmp_path / "undone", *at)
    assert contents(tmp_path / "undone") == contents(base)
    assert contents(folder) == contents(second)
    liftdist("apply", two, folder, "--undo", *at)
    assert contents(folder) == contents(base)
    index = json.loads((folder / check.INDEX).read_text())
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for file in files for t in load_file(file).values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_differs_elsewhere_is_refused(folders, deltas, tmp_path):
    one, two, cache = deltas
    for source, arguments in (
        (folders[0], [one]),
        (folders[1], [one, "--undo"]),
        (folders[1], [two, "--instead-of", one]),
    ):
        folder = shutil.copytree(source, tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
        file = next(iter(sorted(folder.glob("*.safetensors"))))
        tensors = load_file(file)
        next(t for name, t in tensors.items() if "norm" in name or "embed" in name).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        before = contents(folder)
        said = liftdist("apply", arguments[0], folder, *arguments[1:], "--cache-dir", cache, code=2)
        assert "the base of" in said
        assert contents(folder) == before


def on_a_sharded_model(mesh, base, first, second, one, two):
    model = load(base, ModelConfig(path=str(base)), mesh)

    def equals(folder):
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return all(
            torch.equal(param.full_tensor().view(torch.int16), whole.get_parameter(name).view(torch.int16))
            for name, param in model.named_parameters()
        )

    one, two = delta_file.read(one), delta_file.read(two)
    outcomes = [equals(base)]
    export_errors = []
    for apply, undo, expected in ((one, None, first), (two, one, second), (None, two, base)):
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.int64))  # leaves gathered copies of some parameters
        change_module(model, apply, undo)
        outcomes.append(equals(expected))
    for apply, undo in ((None, one), (two, one)):
        try:
            change_module(model, apply, undo)
        except (UserError, RuntimeError) as error:
            export_errors.append(str(error))
    outcomes.append(equals(base))
    return outcomes, export_errors


@pytest.mark.parametrize("world_size", [1, 3])
def test_apply_undo_and_swap_on_a_model_in_memory_are_exact(world_size, folders, deltas):
    for outcomes, errors in ranks.run(world_size, on_a_sharded_model, *folders, *deltas[:2]):
        assert outcomes == [True] * 5
        assert len(errors) == 2
        assert all("does not hold the new values of the delta" in error for error in errors)


def test_a_plain_module_and_one_loaded_in_another_dtype(folders, deltas):
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    before = {name: param.clone() for name, param in model.named_parameters()}
    one = delta_file.read(deltas[0])
    change_module(model, one)
    after = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    assert all(torch.equal(param, after.get_parameter(name)) for name, param in model.named_parameters())
    change_module(model, undo=one)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    with pytest.raises(UserError, match="the model has no model"):
        change_module(torch.nn.Linear(3, 3), one)


def test_a_process_killed_while_it_applies_leaves_the_old_folder(folders, deltas, tmp_path):
    """Whenever it is killed, the folder is the old model or the new one."""
    one, _, cache = deltas
    folder = shutil.copytree(folders[0], tmp_path / "model")
    old, new = contents(folders[0]), contents(folders[1])
    chance = random.Random(1)
    seen = set()
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "liftdist.cli", "apply", one, folder, "--cache-dir", cache],
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(1 + 2 * chance.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        now = contents(folder)
        assert now in (old, new)
        seen.add("new" if now == new else "old")
        if now == new:
            shutil.rmtree(folder)
            shutil.copytree(folders[0], folder)
    print(seen)


def test_folders_of_other_architectures_have_no_difference(folders, tmp_path):
    other = builders.llama(tmp_path / "other", dtype=torch.bfloat16, hidden_size=100, num_hidden_layers=1)
    assert "has no" in liftdist("diff", folders[0], other, "--output", tmp_path / "d", "--cache-dir", tmp_path, code=2)
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a run made.


def a_run(mesh, config):
    attempt = claims.claim(Path(config.run_dir), lambda _: {})
    trainer = builders.trainer(mesh, config)
    for _ in range(config.train.steps):
        trainer.run_step()
    base = weights.digest(trainer.inputs.folder, Path(config.run_dir).parent / "cache")
    text = json.dumps({"model": {"path": config.model.path, "dtype": config.model.dtype}})
    writer = saver.Checkpointer(attempt, mesh, 1, None)
    origin = {"config": text, "base": base, "data": "", "step": trainer.step, "state": trainer.state()}
    writer.save(
        trainer.method.principal.state_dict(trainer.method.optimizer), trainer.method.principal.matrices, origin
    )
    writer.wait()
    return {name: param.full_tensor().detach().clone() for name, param in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run in bf16 whose principal weights have changed twice, and the weights it ended with."""
    folder = tmp_path_factory.mktemp("trained")
    config = builders.config(
        folders[0], write_records(folder / "records.jsonl"), folder,
        model=dict(dtype="bfloat16"), selection=dict(refresh_interval=2), optimizer=dict(lr=0.05), train=dict(steps=5),
    )  # fmt: skip
    (parameters,) = ranks.run(1, a_run, config)
    return folder, parameters


def test_every_export_of_a_run_is_the_trained_model(trained, folders, tmp_path):
    folder, parameters = trained
    cache = ("--cache-dir", folder / "cache")
    for form in ("hf", "delta", "shira", "patch"):
        liftdist("export", folder / "run", "--format", form, "--output", tmp_path / form, *cache)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert merged.dtype == torch.bfloat16
    moved = 0
    for name, param in merged.named_parameters():
        assert torch.equal(param.view(torch.int16), parameters[name].view(torch.int16)), name
        moved += int((param != AutoModelForCausalLM.from_pretrained(folders[0]).get_parameter(name)).sum())
    assert moved > 1000
    expected = {p.name for p in folders[0].iterdir() if p.is_file()}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == expected
    assert "lm_head.weight" not in json.loads((tmp_path / "hf" / check.INDEX).read_text())["weight_map"]  # tied
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template

    liftdist("apply", tmp_path / "delta", folders[0], "--output", tmp_path / "applied", *cache)
    assert weights.digest(tmp_path / "applied", tmp_path) == weights.digest(tmp_path / "hf", tmp_path)
    liftdist("export", tmp_path / "delta", "--base", folders[0], "--output", tmp_path / "again", *cache)
    assert weights.digest(tmp_path / "again", tmp_path) == weights.digest(tmp_path / "hf", tmp_path)

    patch = load_file(tmp_path / "patch")
    patched = AutoModelForCausalLM.from_pretrained(folders[0])
    shapes = json.loads(safe_metadata(tmp_path / "patch")["shapes"])
    for name, shape in shapes.items():
        param = patched.get_parameter(name)
        assert list(param.shape) == shape
        param.data.view(-1)[patch[f"{name}.indices"].long()] = patch[f"{name}.values"]
    assert all(torch.equal(p, parameters[name]) for name, p in patched.named_parameters())
    assert "exists" in liftdist("export", folder / "run", "--output", tmp_path / "hf", *cache, code=2)
    assert "those it has: 5" in liftdist(
        "export", folder / "run", "--step", 3, "--output", tmp_path / "x", *cache, code=2
    )
    other = ("--base", folders[1], "--output", tmp_path / "x")
    assert "is another model than the base" in liftdist("export", folder / "run", *other, *cache, code=2)


def test_peft_loads_the_adapter_and_computes_what_the_merged_model_does(trained, folders, tmp_path):
    from peft import PeftModel

    folder, _ = trained
    for form in ("hf", "shira"):
        liftdist(
            "export", folder / "run", "--format", form, "--output", tmp_path / form, "--cache-dir", folder / "cache"
        )
    tokens = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(folders[0])
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "shira")
        logits = adapted(tokens).logits
        unloaded = adapted.merge_and_unload()(tokens).logits
    assert not torch.equal(merged, plain)
    assert torch.equal(logits, merged)
    assert torch.equal(unloaded, merged)


def test_a_float32_run_of_a_bf16_model_loses_nothing(folders, tmp_path):
    config = builders.config(
        folders[0], write_records(tmp_path / "records.jsonl"), tmp_path, optimizer=dict(lr=1e-4), train=dict(steps=2)
    )
    (parameters,) = ranks.run(1, a_run, config)
    changes, base, dtype = of_run.of_run_dir(tmp_path / "run", None, None)
    assert dtype == torch.float32
    delta_file.write(changes, tmp_path / "delta")
    export(changes, base, tmp_path / "hf", "hf", tmp_path / "cache", dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(param, parameters[name]) for name, param in merged.named_parameters())
    applied = model_folders.change_folder(
        base, tmp_path / "cache", delta_file.read(tmp_path / "delta"), output=tmp_path / "applied"
    )
    undone = model_folders.change_folder(
        applied, tmp_path / "cache", undo=delta_file.read(tmp_path / "delta"), output=tmp_path / "undone"
    )
    assert contents(undone) == contents(base)


def test_a_checkpoint_that_is_removed_while_it_is_exported_is_named(trained, folders, tmp_path):
    run_dir = shutil.copytree(trained[0] / "run", tmp_path / "run")
    changes, _, _ = of_run.of_run_dir(run_dir, None, folders[0])
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match="step-00000005: was removed meanwhile; a file named keep in it keeps it"):
        changes.get(changes.names[0])
