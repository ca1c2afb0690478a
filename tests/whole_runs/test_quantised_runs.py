"""Runs on a quantised base: continued on other numbers of ranks, exported in both meanings, refused where it has none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import builders
import pytest
import ranks
import torch
from commands import liftdist, run_command, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.deltas import of_run
from liftdist.deltas.formats import as_trained
from liftdist.engine.quantisation import Format
from liftdist.errors import UserError
from liftdist.evaluation.evaluate import evaluate
from liftdist.evaluation_settings import TaskConfig
from liftdist.runs.context import RunContext

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


ASKED = "model.dtype=bfloat16", "model.base_dtype=int8"


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """The folder of a run on two ranks, its config, and what the command said."""
    folder = tmp_path_factory.mktemp("trained")
    base = builders.llama(folder / "base", smollm2, dtype=torch.bfloat16, hidden_size=64, num_attention_heads=4)
    records = builders.write_records(folder / "records.jsonl")
    sync = dict(to=str(folder / "sync"), interval=5)
    config = write_config(folder, base, records, optimizer=dict(lr=0.05), sync=sync)
    run = run_command("train", config, "--nproc", 2, *ASKED)
    assert run.returncode == 0, run.stdout
    return folder, config, run.stdout


def test_exports_are_onto_the_base_or_as_trained(trained, tmp_path):
    folder, config, _ = trained
    base = folder / "base"
    computed, *_ = ranks.run(2, builders.continued, configs.load(config, ASKED)[0], logits)
    cache = ("--cache-dir", tmp_path / "cache")
    for name in ("hf", "as_trained", "delta"):
        liftdist("export", folder / "run", "--format", name, "--output", tmp_path / name, *cache)
    before, onto, written = (
        load_file(path / "model.safetensors") for path in (base, tmp_path / "hf", tmp_path / "as_trained")
    )
    number = 0
    for name, weights in before.items():
        if ".layers." not in name or weights.ndim < 2:
            assert torch.equal(written[name], weights)
            continue
        rounded, changed = Format("int8", weights.shape[1]).rounded(weights), onto[name] != weights
        number += changed.sum()
        assert torch.equal(written[name][changed], onto[name][changed])
        # a trained weight may have moved back to where it began, and is exact
        same = (written[name] == rounded) | (written[name] == weights)
        assert same[~changed].all()
        assert (written[name] != rounded).sum() <= 0.3 * weights.numel()
    assert number
    exact = tmp_path / "exact"
    liftdist("compress", tmp_path / "delta", "--output", exact, *cache)
    for delta in (tmp_path / "delta", exact):
        again = tmp_path / f"again-{delta.name}"
        liftdist("export", delta, "--format", "as_trained", "--base", base, "--output", again, *cache)
        assert (again / "model.safetensors").read_bytes() == (tmp_path / "as_trained/model.safetensors").read_bytes()
    as_trained.write(of_run.of_run_dir(folder / "run", None, base)[0], base, tmp_path / "wider", torch.float32)
    for name, weights in load_file(tmp_path / "wider/model.safetensors").items():
        assert torch.equal(weights, written[name].float()), (
            name
        )  # rounded as in training, in whichever dtype it is written

    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("as_trained", "hf"))
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(TOKENS).logits, computed)
    assert not torch.equal(other(TOKENS).logits, computed)


def test_what_is_not_all_that_was_trained_is_not_written_as_trained(trained, tmp_path):
    folder, *_ = trained
    cache = ("--cache-dir", tmp_path / "cache")
    liftdist("export", folder / "run", "--format", "delta", "--output", tmp_path / "whole", *cache)
    lossy = ("--method", "t_switch", "--alpha", 0.5)
    liftdist("compress", tmp_path / "whole", *lossy, "--output", tmp_path / "lossy", *cache)
    liftdist("merge", tmp_path / "whole", "--rule", "mean", "--output", tmp_path / "merged", *cache)
    for name, problem in (
        ("lossy", "lossy was compressed with losses: use hf"),
        ("merged", "merged is no such: use hf"),
    ):
        form = ("--format", "as_trained", "--base", folder / "base", "--output", tmp_path / "out", *cache)
        assert problem in liftdist("export", tmp_path / name, *form, code=2)


def test_it_is_said_which_base_results_are_on(trained, tmp_path):
    folder, _, said = trained
    assert (
        "over a base rounded to int8; exports, deltas, what sync.to publishes hold what is learned over the orig"
        in said
    )
    assert "run/export, over the original weights" in said
    cache = ("--cache-dir", tmp_path / "cache")
    card = liftdist("push", folder / "run", "o/n", "--dry-run", *cache)
    assert (
        "evaluated, over the base model's matrices rounded to int8; here what was learned is over the original" in card
    )
    card = liftdist("push", folder / "run", "o/n", "--format", "as_trained", "--dry-run", *cache)
    assert "matrices are rounded to int8, as they were in training and evaluation" in card
    liftdist("export", folder / "run", "--format", "as_trained", "--output", tmp_path / "as_trained", *cache)
    assert "as they were in training and evaluation" in liftdist("push", tmp_path / "as_trained", "o/n", "--dry-run")


def asked_on(mesh, file, kinds, run_dir):
    """What is said where a run is asked on bases rounded in other ways; of its figures, those of its own."""
    said = []
    for kind in kinds:
        settings, text = configs.load(file, [*ASKED, f"model.base_dtype={kind}", f"run_dir={run_dir}"])
        settings.eval.tasks = [
            TaskConfig(name="ppl", kind="perplexity", path=str(file.parent / "records.jsonl"), limit=4)
        ]
        try:
            evaluate(RunContext(settings, mesh, Console(False)), text)
            said.append("asked")
        except UserError as error:
            said.append(str(error))
    return said


def test_a_run_is_asked_on_the_base_that_it_was_trained_on(trained, tmp_path):
    folder, config, _ = trained
    kinds = "int8", "nf4", ""
    ((own, other, plain),) = ranks.run(1, asked_on, config, kinds, folder / "run")
    assert own == "asked"
    assert "was trained with other settings: model.base_dtype: int8 -> nf4; ask it with those" in other
    assert "model.base_dtype: int8 -> None" in plain
    ((own, other, plain),) = ranks.run(1, asked_on, config, kinds, tmp_path / "base alone")
    assert own == "asked"
    assert "holds answers of another model than model.path, or of another model.base_dtype" in other
    assert plain == other


def refreshed(mesh, settings, change):
    made = builders.trainer(mesh, settings)
    made.run_step()
    file = Path(settings.model.path) / "model.safetensors"
    if change == "gone":
        file.rename(file.with_suffix(".away"))
    elif change == "changed":
        tensors = load_file(file)
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})
    try:
        for _ in range(2):
            made.run_step()
        return "refreshed"
    except UserError as error:
        return str(error)


def test_a_base_that_changes_under_a_run_is_noticed(smollm2, tmp_path):
    """Its values are read again for weights that a refresh selects."""
    records = builders.write_records(tmp_path / "records.jsonl")
    for change in ("changed", "gone", "nothing"):
        base = builders.llama(tmp_path / change, smollm2)
        settings = builders.config(base, records, tmp_path, model=dict(base_dtype="nf4"), optimizer=dict(lr=0.5))
        settings.selection.refresh_interval = 2
        (said,) = ranks.run(1, refreshed, settings, change)
        problem = {"changed": "has changed since", "gone": "is gone since", "nothing": "refreshed"}[change]
        assert problem in said


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


@pytest.mark.parametrize("setting", ["activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
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


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def trained_once(mesh, file):
    return builders.run_once(mesh, *configs.load(file, ["model.base_dtype=nf4", "model.trust_remote_code=true"]))


def test_a_model_with_code_of_its_own_is_written_as_trained(tiny_model, tmp_path):
    """Where the run was to run that; by the word of a delta's file it is not."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "own.py").write_text(OWN_CODE)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    settings = json.loads((base / "config.json").read_text()) | {"model_type": "own", "auto_map": own}
    (base / "config.json").write_text(json.dumps(settings))
    records = builders.write_records(tmp_path / "records.jsonl")
    file = write_config(tmp_path, base, records, train=dict(steps=1, export=False))
    assert ranks.run(1, trained_once, file) == ["finished"]
    delta, folder = of_run.of_run_dir(tmp_path / "run", None, None)[:2]
    as_trained.write(delta, folder, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    for name in delta.names:
        rounded = Format("nf4", before[name].shape[1]).rounded(before[name])
        changed = (after[name] != rounded).flatten().nonzero().squeeze(1)
        assert 0 < len(changed) <= len(delta.get(name).indices)
        assert torch.isin(changed, delta.get(name).indices).all()
    assert (tmp_path / "out" / "own.py").read_text() == OWN_CODE
    with pytest.raises(UserError, match="the folder contains its code: set model.trust_remote_code=true to run it"):
        as_trained.write(replace(delta, trusted=False), folder, tmp_path / "other")
