"""The planner as a command, and before a job is submitted."""

import json
import re
import shutil

import builders
import pytest
from commands import call, write_config

from liftdist.errors import UserError
from liftdist.planning import plan
from liftdist.registry import BUDGETS, CRITERIA


@pytest.fixture
def config(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)  # and nothing else
    return write_config(tmp_path, folder, builders.write_records(tmp_path / "records.jsonl"))


def test_a_plan_needs_no_weights(config):
    code, said = call("plan", config, "--nodes=2", "--gpus-per-node=4", "--gpu=h100", "mesh.dp_replicate=2")
    assert code == 0, said
    assert "2 replicas of 4 shards" in said
    assert "fits: " in said
    assert "tokens/s" in said
    assert (
        "tokens/s" not in call("plan", config, "--gpus-per-node=8", "--gpu-memory=24")[1]
    )  # of a GPU that is not known
    found = json.loads(call("plan", config, "--gpus-per-node=2", "--json")[1])
    assert found["layout"] == {"nodes": 1, "gpus_per_node": 2, "dp_replicate": 1, "dp_shard": 2}
    assert found["model"]["matrices"] == 14
    assert found["fits"] is None
    assert found["peak"] > sum(found["memory"][part] for part in ("weights", "principal", "activations"))


def test_what_does_not_fit_is_said_with_what_would(config, tmp_path):
    model = tmp_path / "model" / "config.json"  # of which two shards save more than they gather
    model.write_text(json.dumps(json.loads(model.read_text()) | {"num_hidden_layers": 8, "vocab_size": 300}))
    config.write_text(config.read_text().replace("micro_batch_size: 2", "micro_batch_size: 1"))
    on_one, on_two = (
        json.loads(call("plan", config, f"--gpus-per-node={number}", "--json")[1])["peak"] for number in (1, 2)
    )
    gib = (on_one + on_two) / 2 / plan.USABLE / plan.GIB
    assert on_two < on_one
    code, said = call("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}")
    assert code == 1
    assert "does not fit: " in said
    assert "it needs 2 shards" in said
    _, said = call("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib / 50}")
    assert re.search(r"it needs at least [\d.]+ GiB on any number of shards: use GPUs with more memory", said)
    _, said = call("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}", "data.max_length=50000")
    assert "GiB on any number of shards: set model.activation_checkpointing=true, or lower data.max_length" in said
    recomputed = "data.max_length=50000", "model.activation_checkpointing=true"
    _, said = call("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}", *recomputed)
    assert "GiB on any number of shards: set model.offload_activations=true, or lower data.max_length" in said


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
    code, said = call("plan", config, *words)
    assert (code, said.count("\n")) == (2, 1)
    assert problem in said


def test_a_run_that_cannot_fit_is_not_submitted(tiny_model, tmp_path):
    loaded = builders.config(tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path)
    plan.check_fits(loaded, 1, 2)
    loaded.slurm.gpu_memory = 80.0
    plan.check_fits(loaded, 1, 2)
    loaded.slurm.gpu_memory = 0.001
    with pytest.raises(UserError, match=r"slurm.gpu_memory=0.001: does not fit: .* on 2 shards"):
        plan.check_fits(loaded, 1, 2)


WHOLE = {  # budgets of whole matrices, of two layers: how much of all is trained, at most
    "half": (0.3, 0.7, []),
    "layers": (0.3, 0.7, ["selection.layers=1"]),
    "greentrainer": (1, 1, ["selection.criterion=gradient", "selection.backward_flops=0.5"]),
}
CHOICES = [
    *(["selection.criterion=" + name] for name in CRITERIA if name not in ("threshold", "file", "spiel")),
    *(["selection.budget=" + name] for name in BUDGETS if name not in ("by_pattern", "ist", *WHOLE)),
    ["selection.budget=by_pattern", 'selection.shares=["*.down_proj=0.3", "*.q_proj=0"]'],
    ["selection.criterion=spiel", "selection.final_refresh=4"],
    ["selection.exclude=[a.delta]"],
]


def test_every_choice_of_weights_is_planned(config):
    plain = json.loads(call("plan", config, "--gpus-per-node=2", "--json")[1])
    for words in CHOICES:
        code, said = call("plan", config, "--gpus-per-node=2", "--json", *words)
        assert code == 0, said
        found = json.loads(said)
        assert found["model"]["principal"] == plain["model"]["principal"]  # the sum is what was asked
        assert found["memory"]["selecting"] > 0
        assert found["selection"]["all"] > 0
    weights = plain["model"]["principal"] / 0.05
    for name, (least, most, words) in WHOLE.items():
        code, said = call(
            "plan", config, "--gpus-per-node=2", "--json", "selection.density=", f"selection.budget={name}", *words
        )
        assert code == 0, said
        assert 0.99 * least < json.loads(said)["model"]["principal"] / weights < 1.01 * most
    code, said = call("plan", config, "--gpus-per-node=2", "--json", "selection.budget=ist", "selection.layers=1")
    assert (code, json.loads(said)["model"]["principal"] / plain["model"]["principal"]) == (0, 0.5), said
    largest = 50 * 93
    excluding = found["memory"]["selecting"] - plain["memory"]["selecting"]
    assert excluding == largest
    for words in (
        ["selection.criterion=threshold", "selection.threshold=0.1"],
        ["selection.criterion=file", "selection.file=f"],
    ):
        code, said = call("plan", config, "--gpus-per-node=2", "selection.density=", *words)
        assert (code, "how many weights are trained is known when they are selected" in said) == (2, True), said


def test_a_step_that_recomputes_less_or_sends_activations_takes_as_long_as_that(config):
    def planned(*overrides):
        return json.loads(call("plan", config, "--gpus-per-node=2", "--gpu=h100", "--json", *overrides)[1])

    kept, every, second, selective = (
        planned(f"model.activation_checkpointing={choice}") for choice in ("false", "true", "2", "selective")
    )
    assert selective["step"]["computing"] == kept["step"]["computing"]
    assert second["step"]["computing"] - kept["step"]["computing"] == pytest.approx(
        (every["step"]["computing"] - kept["step"]["computing"]) / 2
    )
    assert [one["memory"]["activations"] for one in (kept, selective, every)] == sorted(
        (one["memory"]["activations"] for one in (kept, selective, every)), reverse=True
    )
    offloaded = planned("model.offload_activations=true")
    on_host = offloaded["memory"]["activations, on the host"]
    assert offloaded["memory"]["activations"] < every["memory"]["activations"]
    assert 0 < on_host <= kept["memory"]["activations"]
    micro = 2  # of two sequences each
    assert offloaded["step"]["host"] == pytest.approx(2 * micro * on_host / 25e9)
