"""Runs that continue: to the bit on the same ranks, from the same state on any others, with other settings if allowed."""

import contextlib
import json
import os
import re
import threading
import time
from pathlib import Path

import builders
import hooks
import pytest
import ranks
from commands import run_command, user_error, write_config

from liftdist import config as configs
from liftdist import schema_tree
from liftdist.errors import Stopped, UserError
from liftdist.runs import checkpoint
from liftdist.runs.saver import Checkpointer, Saved
from liftdist.runs.stop import StopRequests
from liftdist.training import trainer
from liftdist.training.run import train

WORLDS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "2x2": (4, 2)}


def stopped_everywhere(mesh, config, run_dir, stops):
    """Save after every step of one run; then continue from those in ``stops`` to the end."""
    attempt = builders.claimed_by_all(mesh, run_dir)
    trainer = builders.trainer(mesh, config)
    saver = Checkpointer(attempt, mesh, 100, None)
    losses, digests = [], []
    for _ in range(builders.STEPS):
        losses.append(trainer.run_step()["train/loss"])
        digests.append(builders.global_digest(trainer))
        assert isinstance(builders.save(trainer, saver), Saved)
    resumed = []
    for step in stops:
        trainer = builders.trainer(mesh, config, checkpoint.open_step(run_dir / f"checkpoints/step-{step:08d}"))
        loaded = builders.global_digest(trainer)
        more = [trainer.run_step()["train/loss"] for _ in range(builders.STEPS - step)]
        resumed.append((loaded, more, builders.global_digest(trainer)))
    return losses, digests, resumed


@pytest.mark.parametrize(
    "stops",
    [
        (
            1,
            builders.REFRESH - 1,
            builders.REFRESH,
            2 * builders.REFRESH - 1,
            builders.STEPS - 1,
        ),  # epochs end inside steps 7, 14 and 20
        pytest.param(range(1, builders.STEPS), marks=pytest.mark.slow),
    ],
    ids=["some", "every"],
)
def test_a_run_stopped_at_any_step_continues_to_the_bit(stops, tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    for losses, digests, resumed in ranks.run(2, stopped_everywhere, config, tmp_path / "run", stops):
        assert len(set(digests)) == builders.STEPS
        for step, run in zip(stops, resumed, strict=True):
            assert run == (digests[step - 1], losses[step:], digests[-1]), step


def save_after(mesh, config, run_dir, steps, more):
    """Train, save, and train on."""
    attempt = builders.claimed_by_all(mesh, run_dir)
    trainer = builders.trainer(mesh, config)
    for _ in range(steps):
        trainer.run_step()
    assert isinstance(builders.save(trainer, Checkpointer(attempt, mesh, 1, None)), Saved)
    return builders.global_digest(trainer), [trainer.run_step()["train/loss"] for _ in range(more)]


def load_some(mesh, config, folder, worlds, steps, more):
    """From the checkpoints of other worlds: the state, and the losses of some steps more."""
    result = {}
    for world in worlds:
        saved = builders.newest(mesh, folder / world, builders.accepted_in(folder / world))
        assert saved.number == steps
        trainer = builders.trainer(mesh, config, saved)
        result[world] = builders.global_digest(trainer), [trainer.run_step()["train/loss"] for _ in range(more)]
    return result


@pytest.mark.parametrize(
    "worlds", [("1", "3", "2x2"), pytest.param(tuple(WORLDS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_saved_on_any_world_loaded_on_any_other(worlds, tiny_model, tmp_path):
    check_worlds(worlds, tiny_model, tmp_path)


def test_experts_saved_on_any_world_are_loaded_on_any_other(smollm2, tmp_path):
    """Three ranks share five experts unevenly."""
    sizes = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, hidden_size=48)
    check_worlds(("1", "3"), builders.llama(tmp_path / "model", smollm2, "qwen3_moe", **sizes), tmp_path)


def check_worlds(worlds, model, tmp_path):
    steps, more = 8, 10  # a refresh before and one after
    config = builders.config(model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS)
    straight = {
        world: ranks.run(
            WORLDS[world][0], save_after, config, tmp_path / world, steps, more, dp_replicate=WORLDS[world][1]
        )[0]
        for world in worlds
    }
    for size, replicas in (WORLDS[world] for world in worlds):
        for rank in ranks.run(size, load_some, config, tmp_path, worlds, steps, more, dp_replicate=replicas):
            for world, (digest, losses) in rank.items():
                assert digest == straight[world][0]
                assert losses == pytest.approx(straight[world][1], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Through the command, and with other settings.


def test_a_run_goes_on_where_it_was_stopped(tiny_model, tmp_path):
    """Through the command, on another number of ranks; a fresh one is elsewhere."""
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))

    def ask_to_stop():
        while not list((tmp_path / "run").glob("attempts/*")):
            time.sleep(0.005)
        (tmp_path / "run" / "stop-requested").touch()  # while it is loading

    threading.Thread(target=ask_to_stop, daemon=True).start()
    first = run_command("train", config, "--nproc", 2)
    assert first.returncode == 75, first.stdout
    assert "liftdist: stopped (stop-requested); the same command continues" in first.stdout
    end = builders.last_end(tmp_path / "run")
    assert (end["outcome"], end["reason"]) == ("stopped", "stop-requested")
    assert run_command("train", config, "--nproc", 1).returncode == 0
    assert builders.last_end(tmp_path / "run")["outcome"] == "finished"
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 1  # of those that came to train
    fresh = run_command("train", config, "--nproc", 1, "--fresh", "model.path=none")
    assert f"run_dir {tmp_path}/run is taken; starting in {tmp_path}/run-2" in fresh.stdout
    assert (tmp_path / "run-2" / "attempts").is_dir()
    changed = run_command("train", config, "--nproc", 1, "train.steps=9")  # before ranks are started
    assert "train.steps: 5 -> 9; --allow-changes continues with the new ones" in user_error(changed)
    assert len(changed.stdout.splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000005"]


def change_settings(mesh, first, others):
    """How a run with ``first`` settings ends, and how it goes on with each of ``others``."""
    ends = []
    for config, text, allowed in [first, *others]:
        try:
            train(config, mesh, text, set(allowed), StopRequests())
            ends.append(metrics_of(config)[-1]["step"])
        except UserError as error:
            ends.append(str(error))
    return ends


def metrics_of(config):
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_changed_settings_are_named_and_need_to_be_allowed(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    other_model = builders.llama(tmp_path / "other", tiny_model, initializer_range=0.07)

    def settings(steps, allowed=(), **changes):
        file = write_config(tmp_path, tiny_model, records)
        overrides = [f"{key}={value}" for key, value in changes.items()]
        overrides += [f"train.steps={steps}", "train.export=false", "checkpoint.keep=9"]
        return *configs.load(file, [override.replace("__", ".") for override in overrides]), allowed

    course, state = {schema_tree.COURSE}, {schema_tree.COURSE, schema_tree.STATE}
    ends, _ = ranks.run(
        2, change_settings, settings(2), [
            settings(2, train__micro_batch_size=3, train__log_interval=2),
            settings(4),
            settings(4, course, selection__density=0.06),
            settings(4, course, optimizer__lr=1e-4),
            settings(4, state, optimizer__lr=1e-4, selection__modules='["*.mlp.*"]'),
            settings(6, state, optimizer__lr=1e-4, selection__density=0.06),
            settings(6, course, optimizer__lr=1e-4, selection__density=0.06, model__path=other_model),
        ],
    )  # fmt: skip
    assert [end for end in ends if isinstance(end, int)] == [2, 2, 4, 6]
    refused = [end for end in ends if isinstance(end, str)]
    assert "train.steps: 2 -> 4; --allow-changes continues with the new ones" in refused[0]
    assert "selection.density: 0.05 -> 0.06; --allow-state-changes continues with the new ones" in refused[1]
    assert "self_attn.k_proj.weight, which is not trained now; its weights would be lost" in refused[2]
    assert "model.path: the weights have changed (" in refused[3]
    run_dir = tmp_path / "run" / "checkpoints"
    densities = []
    for step in (4, 6):
        parameters = json.loads((run_dir / f"step-{step:08d}" / "manifest.json").read_text())["parameters"].values()
        densities.append([p["principal"] / (p["shape"][0] * p["shape"][1]) for p in parameters])
    assert densities[0] == pytest.approx([0.05] * 14, abs=1e-3)
    assert densities[1] == pytest.approx([0.06] * 14, abs=1e-3)  # selected anew

    records.write_text(records.read_text() + '{"prompt": "one more", "completion": "yes"}\n')
    ((end,), _) = ranks.run(2, change_settings, (*settings(6, optimizer__lr=1e-4, selection__density=0.06)[:2], ()), [])
    assert "data.path: the contents have changed" in end


def test_another_batch_size_sees_the_rest_of_the_data_and_no_more(tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    ends = []
    for batch, stop in ((4, 5), (8, 7), (3, None)):  # 40 records
        overrides = ["train.steps=null", "train.epochs=1", f"train.batch_size={batch}", "train.export=false"]
        ranks.run(1, run_until, *configs.load(file, overrides), stop)
        ends.append(
            [
                (line["step"], line["train/sequences"])
                for line in metrics_of(configs.load(file)[0])
                if "train/loss" in line
            ][-1]
        )
    assert ends == [(5, 20), (7, 36), (9, 40)]  # five batches of 4, two of 8, then 3 and 1


def run_until(mesh, config, text, step):
    """A run that is asked to stop after ``step``."""
    stop = StopRequests()

    def stop_there(figures, trained):
        if trained.step == step:
            stop.reason = "enough"
        return figures

    with hooks.around(trainer.Trainer, "run_step", after=stop_there), contextlib.suppress(Stopped):
        train(config, mesh, text, {schema_tree.COURSE}, stop)


def test_a_value_from_the_environment_that_changed_is_noticed(tiny_model, tmp_path, monkeypatch):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    overrides = ["optimizer.lr=${oc.env:RATE}", "train.export=false", "train.steps=2"]
    monkeypatch.setenv("RATE", "0.001")
    first = *configs.load(file, overrides), ()
    monkeypatch.setenv("RATE", "0.5")
    second = *configs.load(file, overrides), ()
    assert first[1] == second[1]
    (ends,) = ranks.run(1, change_settings, first, [first, second])
    assert ends[:2] == [2, 2]
    assert "optimizer.lr: its value from the environment has changed" in ends[2]


def in_another_environment(mesh, file, overrides):
    """How a run ends when rank 1 has another value in its environment."""
    os.environ["RATE"] = "0.5" if mesh.rank else "0.001"
    config, text = configs.load(file, overrides)
    try:
        train(config, mesh, text, set(), StopRequests())
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_start_from_something_else_are_named(tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    for end in ranks.run(2, in_another_environment, file, ["optimizer.lr=${oc.env:RATE}", "train.steps=1"]):
        assert re.fullmatch(r"rank 1 on .* differs from rank 0 in environment; use the same on every machine", end)


def test_curves_go_on_without_a_step_twice(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    config, text = configs.load(file, ["train.steps=6", "checkpoint.interval=2"])
    ranks.run(1, break_after, config, text, 5)
    assert [line["step"] for line in metrics_of(config) if "train/loss" in line] == [1, 2, 3, 4, 5]
    (Path(config.run_dir) / "metrics.jsonl").open("a").write('{"step": 5, "tra')  # cut short
    ((end, again),) = ranks.run(1, change_settings, (config, text, ()), [(config, text, ())])
    assert end == again == 6
    assert sorted(p.name for p in Path(config.run_dir).glob("export*")) == ["export"]  # nothing was left to do
    assert [line["step"] for line in metrics_of(config) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics_of(config) if "eval/loss" in line] == [0, 2, 4, 6]
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("checkpoint/blocked_seconds")] == [2, 4, 6]


def break_after(mesh, config, text, step):
    """A run that a bug ends after ``step``."""

    def fail(trained):
        if trained.step == step:
            raise RuntimeError("a bug")

    with hooks.around(trainer.Trainer, "run_step", before=fail), pytest.raises(RuntimeError, match="a bug"):
        train(config, mesh, text, set(), StopRequests())
