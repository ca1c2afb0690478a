"""Saving: in the background, once for all replicas, and on disks that are full, slow, read-only or gone."""

import shutil
import subprocess
import threading

import builders
import hooks
import ranks
import torch

from liftdist.runs import saver
from liftdist.runs.saver import Checkpointer, Saved


def test_old_steps_go_but_for_the_marked(tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    (left, folders), _ = ranks.run(2, builders.keep_two_of_five, config, tmp_path / "run", dp_replicate=2)
    assert left[-1] == ["2", "4", "5"]
    assert folders == ["step-00000002", "step-00000004", "step-00000005"]
    assert [path.name for path in (tmp_path / "run/checkpoints/step-00000005").glob("*.safetensors")] == [
        "shard-00000-of-00001.safetensors"  # written once, although two replicas hold it
    ]


def diverge(mesh, config, run_dir):
    attempt = builders.claimed_by_all(mesh, run_dir)
    trainer = builders.trainer(mesh, config)
    saver = Checkpointer(attempt, mesh, 2, None)
    trainer.run_step()
    with torch.no_grad():
        trainer.method.principal.values[3] += mesh.rank * 1e-6
    diverged = builders.save(trainer, saver)
    with torch.no_grad():
        trainer.method.principal.values[3] = torch.nan
    return str(diverged), str(builders.save(trainer, saver))


def test_replicas_that_differ_and_weights_that_are_not_finite_are_not_saved(tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    for diverged, not_finite in ranks.run(2, diverge, config, tmp_path / "run", dp_replicate=2):
        assert "replicas have diverged" in diverged
        assert "_proj.weight has weights or optimizer state that is not finite" in not_finite
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def on_a_bad_disk(mesh, config, disk):
    run_dir = disk / "run"
    attempt = builders.claimed(run_dir)
    trainer = builders.trainer(mesh, config)
    saver = Checkpointer(attempt, mesh, 9, None)

    def step():
        trainer.run_step()
        outcome = builders.save(trainer, saver)
        return outcome.name if isinstance(outcome, Saved) else f"{type(outcome).__name__}: {outcome}"

    outcomes = {"good": step()}
    filler = builders.fill(disk)
    outcomes["full"] = step()
    filler.unlink()
    outcomes["freed"] = step()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    outcomes["read-only"] = step()
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    outcomes["steps"] = ",".join(sorted(builders.accepted_in(run_dir)))
    for name in builders.accepted_in(run_dir):
        builders.verified(run_dir / "checkpoints" / name)
    outcomes["left"] = ",".join(p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith("step-"))
    shutil.rmtree(run_dir)
    outcomes["deleted"] = step()
    return outcomes


def test_a_full_a_read_only_and_a_deleted_disk(small_disk, tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    (outcomes,) = ranks.run(1, on_a_bad_disk, config, small_disk)
    assert outcomes["good"] == "step-00000001"
    assert outcomes["freed"] == "step-00000003"
    assert outcomes["steps"] == "step-00000001,step-00000003"
    assert outcomes["left"] == ""
    for kind, problem in (
        ("full", "No space left"),
        ("read-only", "Read-only file system"),
        ("deleted", "No such file"),
    ):
        assert problem in outcomes[kind]
        assert str(small_disk / "run") in outcomes[kind]
        assert outcomes[kind].startswith("OSError")


def test_a_save_does_not_hold_up_training(tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    ((busy, first, steps, second),) = ranks.run(1, save_on_a_slow_disk, config, tmp_path / "run")
    assert busy
    assert first is None
    assert steps == 3
    assert second == "step-00000001"


def save_on_a_slow_disk(mesh, config, run_dir):
    """Steps go on while a file is being written; the outcome comes later."""
    trainer = builders.trainer(mesh, config)
    writer = Checkpointer(builders.claimed(run_dir), mesh, 2, None)
    trainer.run_step()
    released = threading.Event()
    with hooks.around(saver, "_write_file", before=lambda *_: released.wait()):
        builders.begin_to_save(trainer, writer)
        trainer.run_step()
        trainer.run_step()
        busy, first = writer.busy, writer.take_outcome()
        released.set()
        writer.wait()
    return busy, first, trainer.step, writer.take_outcome().name


def test_ranks_killed_while_they_save_lose_nothing(tmp_path):
    from bench import faults

    result = faults.kill_while_saving(8, tmp_path, seed=5)
    assert result["kills"] == 8
    assert result["inside a save"] > 0
