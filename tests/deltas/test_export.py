"""What a run made, in every form it can be exported to."""

import json
import shutil
from dataclasses import replace

import builders
import pytest
import ranks
import torch
from commands import liftdist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from liftdist import safetensors_header
from liftdist.deltas import file as delta_file
from liftdist.deltas import folder as model_folders
from liftdist.deltas import of_run
from liftdist.deltas.delta import Change, Delta
from liftdist.deltas.export import export
from liftdist.deltas.formats import importance
from liftdist.deltas.module import change_module
from liftdist.errors import UserError
from liftdist.models import check, weights
from liftdist.registry import EXPORT_FORMATS
from liftdist.serving import launch


def test_every_export_of_a_run_is_the_trained_model(trained, folders, tmp_path):
    folder, parameters = trained
    cache = ("--cache-dir", folder / "cache")
    for form in set(EXPORT_FORMATS) - {"peft", "as_trained"}:  # of adapters, of a quantised base
        liftdist("export", folder / "run", "--format", form, "--output", tmp_path / form, *cache)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert merged.dtype == torch.bfloat16
    moved = 0
    for name, param in merged.named_parameters():
        assert torch.equal(param.view(torch.int16), parameters[name].view(torch.int16)), name
        moved += int((param != AutoModelForCausalLM.from_pretrained(folders[0]).get_parameter(name)).sum())
    assert moved > 1000
    expected = {p.name for p in folders[0].iterdir() if p.is_file()} | {"liftdist.json"}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == expected
    assert "lm_head.weight" not in json.loads((tmp_path / "hf" / check.INDEX).read_text())["weight_map"]  # tied
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template

    liftdist("apply", tmp_path / "delta", folders[0], "--output", tmp_path / "applied", *cache)
    assert weights.digest(tmp_path / "applied", tmp_path) == weights.digest(tmp_path / "hf", tmp_path)
    liftdist("export", tmp_path / "delta", "--base", folders[0], "--output", tmp_path / "again", *cache)
    assert weights.digest(tmp_path / "again", tmp_path) == weights.digest(tmp_path / "hf", tmp_path)

    undone = tmp_path / "undone"
    liftdist("apply", tmp_path / "delta", tmp_path / "hf", "--undo", "--output", undone, *cache)
    assert weights.digest(undone, tmp_path) == weights.digest(folders[0], tmp_path)
    assert not (undone / "liftdist.json").exists()  # it is no fine-tuned model
    liftdist("diff", tmp_path / "hf", folders[1], "--output", tmp_path / "upon", *cache)
    liftdist("apply", tmp_path / "upon", tmp_path / "hf", "--output", tmp_path / "both", *cache)
    assert not (tmp_path / "both" / "liftdist.json").exists()  # nor what the run has made

    patch = load_file(tmp_path / "patch")
    patched = AutoModelForCausalLM.from_pretrained(folders[0])
    shapes = json.loads(safetensors_header.header(tmp_path / "patch")["__metadata__"]["shapes"])
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
    assert "is not the base model of" in liftdist("export", folder / "run", *other, *cache, code=2)


def test_a_patch_of_more_than_two_billion_weights_has_wide_indices(tmp_path):
    found = {
        "large": ((2**16, 2**15 + 1), [0, 2**31 - 1, 2**31 + 2**16 - 1]),
        "limit": ((2**16, 2**15), [0, 2**31 - 1]),
        "small": ((2**16, 2**15 - 1), [0, 2**31 - 2**16 - 1]),
    }

    def get(name):
        shape, indices = found[name]
        values = torch.ones(len(indices)).bfloat16()
        return Change(shape, torch.bfloat16, torch.tensor(indices), values, torch.zeros_like(values))

    EXPORT_FORMATS.load("patch").write(Delta(tmp_path, "0" * 64, list(found), get), tmp_path, tmp_path / "patch")
    patch = load_file(tmp_path / "patch")
    for name, (_, indices) in found.items():
        assert patch[f"{name}.indices"].tolist() == indices
    kinds = [patch[f"{name}.indices"].dtype for name in found]
    assert kinds == [torch.int64, torch.int64, torch.int32]


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


def test_a_float32_run_of_a_bf16_model_loses_nothing(folders, tmp_path, capsys):
    config = builders.config(
        folders[0],
        builders.write_records(tmp_path / "records.jsonl"),
        tmp_path,
        optimizer=dict(lr=1e-4),
        train=dict(steps=2),
    )
    (parameters,) = ranks.run(1, builders.train_and_save, config)
    changes, base, dtype = of_run.of_run_dir(tmp_path / "run", None, None)
    assert dtype == torch.float32
    delta_file.write(changes, tmp_path / "delta")
    export(changes, base, tmp_path / "hf", "hf", tmp_path / "cache", dtype)
    one, cache = delta_file.read(tmp_path / "delta"), tmp_path / "cache"
    export(one, base, tmp_path / "of-file", "hf", cache)

    def check(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(param, parameters[name]) for name, param in model.named_parameters())

    check(tmp_path / "hf")
    check(tmp_path / "of-file")
    for output in (None, tmp_path / "applied"):
        with pytest.raises(UserError, match="becomes float32, and is loaded as torch.bfloat16.*config.json first"):
            model_folders.change_folder(base, cache, one, output=output)
    own = shutil.copytree(base, tmp_path / "own")
    settings = json.loads((base / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"dtype": "float32"}))
    before = builders.contents(own)
    check(model_folders.change_folder(own, cache, one))
    model_folders.change_folder(own, cache, undo=one)
    assert builders.contents(own) == before

    with pytest.raises(UserError, match="would undo most changes by rounding; load the model with dtype=torch.float32"):
        change_module(AutoModelForCausalLM.from_pretrained(base), one)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    change_module(model, one)
    assert all(torch.equal(param, parameters[name]) for name, param in model.named_parameters())

    given = [f"one={tmp_path / 'delta'}"]
    for dtype in ("auto", "bfloat16", "half"):
        with pytest.raises(UserError, match="start vLLM with --dtype float32"):
            launch.check_deltas(str(base), given, cache, dtype=dtype)
    launch.check_deltas(str(base), given, cache, dtype="float32")
    export(one, base, tmp_path / "patch", "patch", cache)
    assert "most changes; start it in torch.float32" in capsys.readouterr().err


def test_a_checkpoint_that_is_removed_while_it_is_exported_is_named(trained, folders, tmp_path):
    run_dir = shutil.copytree(trained[0] / "run", tmp_path / "run")
    changes, _, _ = of_run.of_run_dir(run_dir, None, folders[0])
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(
        UserError,
        match="step-00000005: was removed during the export; a file named keep in a checkpoint prevents that",
    ):
        changes.get(changes.names[0])


def test_an_adapter_finds_its_modules_where_the_files_lack_the_prefix(folders, tmp_path):
    """Files of a base model alone have no ``model.`` before their names; peft knows the names in the model."""
    from peft import PeftModel

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(folders[0]).model.save_pretrained(base)
    for name in builders.TOKENIZER_FILES:
        shutil.copy(folders[0] / name, base / name)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"architectures": ["LlamaForCausalLM"]}))
    assert "layers.0.mlp.up_proj.weight" in weights.ModelFolder(base).file_of
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(
        base, records, tmp_path, model=dict(dtype="bfloat16"), optimizer=dict(lr=0.05), train=dict(steps=2)
    )
    ranks.run(1, builders.train_and_save, config)
    cache = ("--cache-dir", tmp_path / "cache")
    for form in ("hf", "shira", "delta"):
        liftdist("export", tmp_path / "run", "--format", form, "--output", tmp_path / form, *cache)
    assert "layers.0.mlp.up_proj.weight" in delta_file.read(tmp_path / "delta").names
    liftdist("export", tmp_path / "delta", "--base", base, "--format", "shira", "--output", tmp_path / "again", *cache)
    assert builders.contents(tmp_path / "again") == builders.contents(tmp_path / "shira")
    tokens = torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(tokens).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "shira")(tokens).logits
    assert not torch.equal(before, merged)
    assert torch.equal(adapted, merged)


def test_adapters_are_of_runs_that_have_some(deltas, folders, tmp_path):
    one, _, cache = deltas
    said = liftdist(
        "export",
        one,
        "--base",
        folders[0],
        "--format",
        "peft",
        "--output",
        tmp_path / "x",
        "--cache-dir",
        cache,
        code=2,
    )
    assert f"{one}: holds no adapters, which --format peft writes; use --format shira, hf or delta" in said
    assert not (tmp_path / "x").exists()


def test_a_delta_is_of_one_step(deltas, folders, tmp_path):
    words = ("export", deltas[0], "--base", folders[0], "--step", 9, "--output", tmp_path / "x")
    assert f"--step 9: {deltas[0]} is a delta, which is of one step; leave it out" in liftdist(*words, code=2)


def test_an_unknown_format_is_an_error(deltas, folders, tmp_path):
    given = delta_file.read(deltas[0])
    with pytest.raises(
        UserError,
        match="export format 'shiar': must be one of hf, as_trained, .*, sglang; did you mean shira",
    ):
        export(given, folders[0], tmp_path / "x", "shiar", tmp_path / "cache")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("format", ["delta", "shira", "importance"])
def test_base_values_that_a_delta_lacks_are_those_of_its_base(format, deltas, folders, tmp_path):
    at = ("--cache-dir", deltas[2])
    liftdist("diff", *folders[:2], "--output", tmp_path / "slim", "--without-base", *at)
    for source, name in ((deltas[0], "whole"), (tmp_path / "slim", "slim-out")):
        out = ("--format", format, "--output", tmp_path / name)
        liftdist("export", source, "--base", folders[0], *out, *at)
    found = [tmp_path / "whole", tmp_path / "slim-out"]
    if format == "shira":
        found = [folder / "adapter_model.safetensors" for folder in found]
    whole, slim = map(load_file, found)
    assert whole.keys() == slim.keys()
    assert all(torch.equal(whole[key], slim[key]) for key in whole)


def test_importance_protects_both_ends(deltas, folders, tmp_path):
    """Against the formula on dense differences, with a tensor that is three-dimensional."""
    given, change = delta_file.read(deltas[0]), {}
    random = torch.Generator().manual_seed(0)
    for name, shape in (("a", (6, 10)), ("b", (3, 4, 5)), ("vector", (7,))):
        before = torch.randn(shape, generator=random)
        after = before + torch.randn(shape, generator=random) * (torch.rand(shape, generator=random) < 0.5)
        where = (before != after).flatten().nonzero().squeeze(1)
        change[name] = Change(shape, torch.float32, where, after.flatten()[where], before.flatten()[where])
    made = replace(given, names=list(change), get=change.__getitem__)
    importance.write(made, folders[0], tmp_path / "found")

    dense = {}
    for name in ("a", "b"):
        flat = torch.zeros(torch.Size(change[name].shape).numel())
        flat[change[name].indices] = (change[name].values.double() - change[name].base.double()).abs().float()
        dense[name] = flat.view(change[name].shape).double()
    positive = torch.cat([x.flatten() for x in dense.values()])
    positive = positive[positive > 0]
    least, middle, largest = positive.min(), positive.quantile(0.5), positive.max()
    found = load_file(tmp_path / "found")
    assert set(found) == {"a", "b"}
    for name, x in dense.items():
        distance = torch.where(x <= middle, (middle - x) / (middle - least), (x - middle) / (largest - middle))
        y = torch.where(x == 0, 1.0, 1 + 9 * distance**2)
        torch.testing.assert_close(found[name].double(), y.mean(-2) * (1 + (x == 0).sum(-2)), rtol=1e-6, atol=0)

    nothing = replace(made, names=["vector"])
    with pytest.raises(UserError, match="changes no matrix"):
        importance.write(nothing, folders[0], tmp_path / "none")
