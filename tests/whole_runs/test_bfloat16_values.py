"""Runs whose values and moments are bf16: saved, continued to the bit, resharded, changed to float32 and back, exported."""

import builders
import pytest
import ranks
import torch
from commands import liftdist, write_config
from safetensors.torch import load_file

from liftdist import config as configs
from liftdist import schema_tree

STATE = {schema_tree.COURSE, schema_tree.STATE}
BEFORE = builders.BEFORE


def load(mesh, config, run_dir):
    """The state of the checkpoint on other ranks, and the dtypes of what steps it. Collective."""
    trainer = builders.trainer(mesh, config, builders.newest(mesh, run_dir, builders.accepted_in(run_dir)))
    principal = trainer.method.principal
    moments = trainer.method.optimizer.state[principal.values]
    dtypes = {str(tensor.dtype) for tensor in (principal.values, moments["exp_avg"], moments["exp_avg_sq"])}
    loaded = builders.global_digest(trainer)
    trainer.run_step()
    return loaded, dtypes, principal.values.grad.dtype == torch.float32


def test_a_run_continues_to_the_bit_and_loads_on_any_ranks(tiny_model, records, tmp_path):
    settings = {key: dict(values) for key, values in builders.SETTINGS.items()}
    settings["optimizer"] |= dict(dtype="bfloat16", reference_numerics=True)
    settings["train"] |= dict(loss_reduction="sequence")
    config = builders.config(tiny_model, records, tmp_path, model=dict(dtype="bfloat16"), **settings)
    for straight, resumed in ranks.run(3, builders.save_and_go_on, config):
        assert straight == resumed
    keys = builders.verified(tmp_path / f"run/checkpoints/step-{BEFORE:08d}").manifest.parameters.values()
    for parameter in keys:
        assert {kind: dtype for kind, dtype in parameter.keys.items() if "indices" not in kind} == dict.fromkeys(
            ("values", "optimizer.exp_avg", "optimizer.exp_avg_sq", "dropped_values"), "bfloat16"
        )
    assert any(parameter.dropped for parameter in keys)
    for size, replicas in ((1, 1), (2, 2), (4, 2)):
        for loaded, dtypes, gradient in ranks.run(size, load, config, tmp_path / "run", dp_replicate=replicas):
            assert loaded == straight[0], (size, replicas)
            assert dtypes == {"torch.bfloat16"}
            assert gradient


def attempts(mesh, *runs):
    return [builders.run_once(mesh, *run) for run in runs]


def test_a_change_of_dtype_needs_to_be_allowed_and_the_export_holds_the_values(tiny_model, records, tmp_path):
    file = write_config(tmp_path, tiny_model, records, checkpoint=dict(keep=9))

    def settings(steps, dtype, allowed=()):
        overrides = ["model.dtype=bfloat16", "data.eval_path=", f"train.steps={steps}", f"optimizer.dtype={dtype}"]
        return *configs.load(file, overrides), allowed

    ends, other = ranks.run(
        2, attempts, settings(4, "bfloat16"), settings(6, "float32", {schema_tree.COURSE}), settings(6, "float32", STATE),
        settings(8, "bfloat16", STATE),
    )  # fmt: skip
    assert ends == other
    assert [ends[0], *ends[2:]] == ["finished"] * 3
    assert "optimizer.dtype: bfloat16 -> float32; --allow-state-changes continues with the new ones" in ends[1]
    for step, dtype in ((4, "bfloat16"), (6, "float32"), (8, "bfloat16")):
        saved = builders.verified(tmp_path / f"run/checkpoints/step-{step:08d}")
        for parameter in saved.manifest.parameters.values():
            assert {parameter.keys[k] for k in ("values", "optimizer.exp_avg", "optimizer.exp_avg_sq")} == {dtype}
    base, exported = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "run/export"))
    for name, tensor in base.items():
        expected = tensor.bfloat16().flatten()
        if name in saved.manifest.parameters:
            indices, values = saved.touched(name)
            assert (expected[indices] != values).float().mean() > 0.5
            expected[indices] = values
        assert torch.equal(exported[name].flatten(), expected), name


DTYPES, REDUCTIONS = "must be one of float32, bfloat16", "must be one of token, sequence"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optimizer.dtype=bfloat16", "must be float32 with model.dtype=float32, or set model.dtype=bfloat16"),
        ("optimizer.dtype=float16", f"{DTYPES} (did you mean bfloat16?), got 'float16'"),
        ("optimizer.dtype=bf16", f"{DTYPES} (did you mean bfloat16?), got 'bf16'"),
        ("optimizer.dtype=16", DTYPES),
        ("optimizer.dtype=", "must not be empty"),
        ("train.loss_reduction=sum", f"{REDUCTIONS}, got 'sum'"),
        ("train.loss_reduction=sample", f"{REDUCTIONS}, got 'sample'"),
        ("train.loss_reduction=Token", f"{REDUCTIONS} (did you mean token?), got 'Token'"),
        ("train.loss_reduction=[token]", ""),
        ("train.loss_reduction=", "must not be empty"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(override, problem, tiny_model, records, tmp_path):
    said = liftdist("train", write_config(tmp_path, tiny_model, records), override, code=2)
    assert f"{override.partition('=')[0]}: {problem}" in said
    assert len(said.splitlines()) == 1


def test_a_file_that_makes_no_sense_is_named_with_its_line(tiny_model, records, tmp_path):
    file = write_config(tmp_path, tiny_model, records, optimizer=dict(dtype="bfloat16"))
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if "bfloat16" in text)
    assert f"{file}:{line}: optimizer.dtype: must be float32" in liftdist("train", file, code=2)
