"""The planner: against real ranks, against a whole step on ranks that do not exist, and as a command."""

import json
import shutil

import builders
import pytest
import ranks
import torch
from test_data import write_records
from test_submit import run
from test_train import write_config

from bench import contenders, memory, scale
from liftdist.engine import topk
from liftdist.engine.criteria import low_rank
from liftdist.errors import UserError
from liftdist.planning import plan
from liftdist.planning.live_bytes import LiveBytes
from liftdist.schema import Config

SMALL = dict(
    vocab_size=1000, hidden_size=130, intermediate_size=301, num_hidden_layers=3, num_attention_heads=5,
    num_key_value_heads=1, tie_word_embeddings=False,
)  # fmt: skip


def test_live_bytes_follow_tensors_and_resized_storages():
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        assert live.now == 4000
        assert kept.view(10, 100).sum().item() == 0.0  # a view is no memory
        del kept
        assert (live.now, live.peak) == (0, 4004)
        held = torch.empty(500)
        held.untyped_storage().resize_(0)
        assert live.now == 0
        held.untyped_storage().resize_(2000)
        assert live.now == 2000
    assert torch.zeros(10).untyped_storage().resize_(80).nbytes() == 80


def a_step(mesh, folder, settings):
    config = Config(run_dir="none")
    config.selection.density, config.selection.method = 0.05, "exact"
    for key, value in settings.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    found = memory.measured(folder, config, mesh)
    return found["peak"], found["planned"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_planned_memory_is_within_a_tenth_of_what_a_rank_has(world, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_attention_heads": 4, "num_hidden_layers": 4}
    folder = builders.llama(tmp_path / "model", dtype=torch.bfloat16, vocab_size=3000, **sizes)
    for settings in (
        {"train__micro_batch_size": 2, "data__max_length": 300, "data__packing": True},
        {"train__micro_batch_size": 1, "data__max_length": 1500},
        {"train__micro_batch_size": 2, "data__max_length": 300, "model__activation_checkpointing": True},
        {"train__micro_batch_size": 1, "data__max_length": 4},
    ):
        found = ranks.run(world, a_step, folder, settings)
        peak, planned = max(found)
        assert planned == pytest.approx(peak, rel=0.1), settings


@pytest.mark.parametrize(
    ("world", "replicas", "mesh"),
    [
        (1024, 1, {}),
        (8, 1, {"density": 0.3}),
        (12, 4, {}),
        (48, 16, {}),
        (8, 1, {"sparse_reduce_scatter": False}),
        (4, 4, {}),
        (1, 1, {}),
    ],
)
def test_collectives_and_memory_of_a_step_are_as_planned(world, replicas, mesh):
    found = scale.step(SMALL, scale.settings(world, replicas, **mesh), world)
    for key in ("read", "collectives"):
        assert found[key] == found[f"planned_{key}"]
    assert found["planned_peak"] == pytest.approx(found["peak"], rel=0.1)
    assert bool(found["collectives"]) == (world > 1)


@pytest.mark.parametrize("method", ["fast", "exact"])
@pytest.mark.parametrize(
    ("shape", "filter_rank"), [((900, 300), 16), ((300, 900), 16), ((700, 700), 4), ((1200, 1200), 8), ((60, 60), 64)]
)
def test_memory_of_a_selection(shape, filter_rank, method, monkeypatch):
    monkeypatch.setattr(topk, "BLOCK", 2**16)
    weight = contenders.slow_spectrum(*shape, torch.device("cpu")).bfloat16()
    count = round(0.05 * weight.numel())
    with LiveBytes() as live:
        low_rank.select(weight, count, filter_rank, method)
    assert live.peak <= 1.05 * low_rank.workspace(*shape, count, filter_rank, method)


def test_nothing_grows_with_the_number_of_replicas():
    few, many = (scale.step(SMALL, scale.settings(3 * replicas, replicas), 3 * replicas) for replicas in (4, 64))
    assert many["peak"] == few["peak"]
    assert many["collectives"] == few["collectives"]


@pytest.mark.parametrize("name", scale.MODELS)
def test_owners_have_much_the_same_to_do(name):
    for world in (2, 8, 16, 56, 128, 200):
        found = scale.balance(scale.MODELS[name], world)
        if found["matrices_a_rank"] >= 4:
            assert found["ratio"] <= 1.1, world


@pytest.mark.slow
@pytest.mark.parametrize("name", scale.MODELS)
@pytest.mark.parametrize("replicas", [1, 128])
def test_a_step_of_models_that_fit_nowhere(name, replicas):
    found = scale.step(scale.MODELS[name], scale.settings(1024, replicas), 1024)
    for key in ("read", "collectives"):
        assert found[key] == found[f"planned_{key}"]
    assert found["planned_peak"] == pytest.approx(found["peak"], rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture
def config(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)  # and nothing else
    return write_config(tmp_path, folder, write_records(tmp_path / "records.jsonl"))


def test_a_plan_needs_no_weights(config):
    code, said = run("plan", config, "--nodes=2", "--gpus-per-node=4", "--gpu=h100", "mesh.dp_replicate=2")
    assert code == 0, said
    assert "2 replicas of 4 shards" in said
    assert "fits: " in said
    assert "tokens/s" in said
    assert (
        "tokens/s" not in run("plan", config, "--gpus-per-node=8", "--gpu-memory=24")[1]
    )  # of a GPU that is not known
    found = json.loads(run("plan", config, "--gpus-per-node=2", "--json")[1])
    assert found["layout"] == {"nodes": 1, "gpus_per_node": 2, "dp_replicate": 1, "dp_shard": 2}
    assert found["model"]["matrices"] == 14
    assert found["fits"] is None
    assert found["peak"] > sum(found["memory"][part] for part in ("weights", "principal", "activations"))


def test_what_does_not_fit_is_said_with_what_would(config):
    config.write_text(config.read_text().replace("micro_batch_size: 2", "micro_batch_size: 1"))
    on_one = json.loads(run("plan", config, "--gpus-per-node=1", "--json")[1])
    gib = (on_one["peak"] - 0.3 * on_one["memory"]["weights"]) / plan.USABLE / plan.GIB
    code, said = run("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}")
    assert code == 1
    assert "does not fit: " in said
    assert "it needs 2 shards" in said
    _, said = run("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib / 50}")
    assert "stay on any number of shards: take GPUs with more memory" in said
    _, said = run("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}", "data.max_length=50000")
    assert "stay on any number of shards: set model.activation_checkpointing=true, or lower data.max_length" in said


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--gpu=h1000"], "--gpu h1000: must be one of a10"),
        (["--nodes=0"], "--nodes must be above 0"),
        (["--gpu-memory=nan"], "--gpu-memory must be above 0"),
        (["--gpus-per-node=3", "mesh.dp_replicate=2"], "3 ranks cannot be 2 replicas"),
        (["model.path=/nonexistent"], "model.path /nonexistent"),
        (["selection.modules=[nothing]"], "no linear module fits"),
        (["selection.density=0.00000001", "model.path=/nonexistent"], "model.path"),
    ],
)
def test_mistakes_are_one_line(words, problem, config):
    code, said = run("plan", config, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert problem in said


def test_a_run_that_cannot_fit_is_not_submitted(tiny_model, tmp_path):
    loaded = builders.config(tiny_model, write_records(tmp_path / "records.jsonl"), tmp_path)
    plan.check_fits(loaded, 1, 2)
    loaded.slurm.gpu_memory = 80.0
    plan.check_fits(loaded, 1, 2)
    loaded.slurm.gpu_memory = 0.001
    with pytest.raises(UserError, match=r"slurm.gpu_memory=0.001: does not fit: .* on 2 shards"):
        plan.check_fits(loaded, 1, 2)
