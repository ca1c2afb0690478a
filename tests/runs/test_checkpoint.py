"""Checkpoints: exact on the same ranks, the same on any others, and never believed when something is wrong with them."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import builders
import pytest
import ranks
import torch
from safetensors.torch import load_file

from liftdist.errors import UserError
from liftdist.runs import checkpoint, claims
from liftdist.runs.saver import Checkpointer

# ---------------------------------------------------------------------------------------------------------------------
# What is on the disk.


def save_two(mesh, config, run_dir):
    """Two checkpoints, after steps 1 and 2; what the second holds."""
    attempt = builders.claimed_by_all(mesh, run_dir)
    trainer = builders.trainer(mesh, config)
    saver = Checkpointer(attempt, mesh, 5, None)
    outcomes = []
    for _ in range(2):
        trainer.run_step()
        outcomes.append(builders.save(trainer, saver))
    matrices = trainer.method.principal.matrices
    return dict(
        bytes=[outcome.bytes for outcome in outcomes],
        principal=trainer.method.principal.num_selected,
        dropped=sum(
            t.numel() for k, t in trainer.method.principal.state_dict().items() if k.endswith("dropped_values")
        ),
        values={m.name: m.rows_local[m.rows_local.shape[0] // 2 :].clone() for m in matrices[:1]},
    )


@pytest.fixture(scope="module")
def two_steps(tiny_model, tmp_path_factory):
    """A run directory with two checkpoints of two ranks; weights are dropped at step 2."""
    folder = tmp_path_factory.mktemp("two")
    settings = builders.SETTINGS | {"selection": dict(refresh_interval=2), "optimizer": dict(lr=0.05, warmup_ratio=0.0)}
    config = builders.config(tiny_model, builders.write_records(folder / "records.jsonl"), folder, **settings)
    return folder / "run", ranks.run(2, save_two, config, folder / "run")


@pytest.fixture
def run_dir(two_steps, tmp_path):
    return shutil.copytree(two_steps[0], tmp_path / "run")


def test_a_checkpoint_holds_what_the_base_model_lacks_and_no_more(two_steps):
    run_dir, found = two_steps
    step = checkpoint.open_step(run_dir / "checkpoints" / "step-00000002")
    dropped = sum(rank["dropped"] for rank in found)
    assert dropped > 0
    # 4 B of index, 4 B of value and 8 B of moments a principal weight; 4 + 4 B a dropped one (float32 model)
    payload = 16 * found[0]["principal"] + 8 * dropped
    headers = 16 * 14 * 7 * 20  # seven tensors a matrix and rank
    assert payload < found[0]["bytes"][1] < payload + headers
    files = sorted(path.name for path in step.folder.iterdir())
    assert files == ["manifest.json", "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]
    for name, parameter in step.manifest.parameters.items():
        indices = torch.cat([load_file(step.folder / file)[f"{name}/indices"] for file in files[1:]])
        assert (indices[1:] > indices[:-1]).all()
        assert indices.numel() == parameter.principal
        touched, values = step.touched(name)
        assert touched.numel() == values.numel() == parameter.principal + parameter.dropped
        assert (touched[1:] > touched[:-1]).all()


def test_random_damage_is_always_found_and_its_file_named(two_steps, tmp_path):
    folder = two_steps[0] / "checkpoints" / "step-00000002"
    chance = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    for number in range(300):
        damaged = shutil.copytree(folder, tmp_path / "step-00000002")
        path = damaged / chance.choice(names)
        data = bytearray(path.read_bytes())
        kind = ("flip", "cut", "remove")[number % 3]
        if kind == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        elif kind == "cut":
            path.write_bytes(data[: chance.randrange(len(data))])
        else:
            path.unlink()
        with pytest.raises((ValueError, OSError)) as caught:
            builders.verified(damaged)
        assert path.name in str(caught.value), (kind, path.name)
        shutil.rmtree(damaged)


def load_newest(mesh, run_dir):
    said = []
    try:
        step = builders.newest(mesh, run_dir, builders.accepted_in(run_dir), said.append)
        return (step.number if step else None), said
    except UserError as error:
        return str(error), said


def test_damaged_steps_are_set_aside_and_older_ones_used(run_dir):
    newer = run_dir / "checkpoints" / "step-00000002"
    shard = newer / "shard-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (number, said), (other, _) = ranks.run(2, load_newest, run_dir)  # only rank 1 reads the damaged file
    assert number == other == 1
    assert "shard-00001-of-00002.safetensors is damaged" in said[0]
    assert (run_dir / "checkpoints" / "set-aside-1-step-00000002" / "manifest.json").exists()
    (run_dir / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    (problem, _), _ = ranks.run(2, load_newest, run_dir)
    assert "none of its checkpoints is intact" in problem
    assert "step-00000001/manifest.json" in problem
    shutil.rmtree(run_dir / "checkpoints")
    (problem, _), _ = ranks.run(2, load_newest, run_dir)
    assert "none of its checkpoints is intact" in problem  # gone is no fresh start, either


def see_another_disk(mesh, run_dir, elsewhere):
    """Rank 1 has no file of the run, as if its machine had not mounted the file system."""
    problem, said = load_newest(mesh, run_dir if mesh.is_main else elsewhere)
    return str(problem), said


def test_a_rank_that_cannot_see_the_files_damages_nothing(run_dir, tmp_path):
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    shutil.copytree(run_dir / "attempts", tmp_path / "elsewhere" / "attempts")
    for problem, said in ranks.run(2, see_another_disk, run_dir, tmp_path / "elsewhere"):
        assert "rank 0 finds it intact: run_dir must be the same folder on every machine" in problem
        assert "(rank 1)" in problem
        assert not said
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before


def test_a_copy_of_a_checkpoint_is_neither_believed_nor_removed(run_dir, tiny_model, tmp_path):
    backup = run_dir / "checkpoints" / "step-00000002-backup"
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", backup)
    renamed = run_dir / "checkpoints" / "step-00000009"
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", renamed)
    assert sorted(builders.accepted_in(run_dir)) == ["step-00000001", "step-00000002"]
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    ranks.run(2, builders.keep_two_of_five, config, run_dir)
    assert backup.is_dir()
    assert renamed.is_dir()


def test_checkpoints_without_an_attempt_are_no_fresh_start(run_dir):
    attempt = run_dir / "attempts" / "attempt-00000001.jsonl"
    text = attempt.read_text()
    attempt.write_text("{" + text[2:])
    (problem, _), _ = ranks.run(2, load_newest, run_dir)
    assert "attempt-00000001.jsonl: damaged" in problem
    attempt.unlink()
    (problem, _), _ = ranks.run(2, load_newest, run_dir)
    assert "holds checkpoints, but no attempt in attempts/ records them" in problem


def replaced(mesh, config, run_dir):
    """A run directory is removed and made anew by another run while this one works."""
    old = builders.claimed(run_dir)
    trainer = builders.trainer(mesh, config)
    writer = Checkpointer(old, mesh, 1, None)
    trainer.run_step()
    names = [builders.save(trainer, writer).name]
    shutil.rmtree(run_dir)
    builders.claimed(run_dir)
    trainer.run_step()
    names.append(str(builders.save(trainer, writer)))
    return names


def test_a_run_directory_made_anew_is_another_one(tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    ((first, second),) = ranks.run(1, replaced, config, tmp_path / "run")
    assert first == "step-00000001"
    assert "was deleted and created again by another run" in second
    assert builders.accepted_in(tmp_path / "run") == {}


def test_a_pickle_is_never_run_and_a_symbolic_link_never_followed(run_dir, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run-by-a-pickle",)

    folder = run_dir / "checkpoints" / "step-00000002"
    for name in ("shard-00000-of-00002.safetensors", "manifest.json", "state.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    elsewhere = shutil.move(run_dir / "checkpoints" / "step-00000001", tmp_path / "elsewhere")
    (run_dir / "checkpoints" / "step-00000001").symlink_to(elsewhere)
    (problem, said), _ = ranks.run(2, load_newest, run_dir)
    assert "none of its checkpoints is intact" in problem
    assert any("symbolic link" in line for line in said)
    assert (elsewhere / "manifest.json").exists()
    assert not (tmp_path / "run-by-a-pickle").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Attempts.


def test_what_an_older_attempt_writes_is_not_believed(run_dir):
    before = builders.accepted_in(run_dir)
    assert sorted(before) == ["step-00000001", "step-00000002"]
    old = builders.first_attempt(run_dir)
    old.note("end", outcome="failed")
    new = builders.claimed(run_dir)
    assert (new.number, new.accepts) == (2, before)
    folder = shutil.copytree(run_dir / "checkpoints" / "step-00000002", run_dir / "checkpoints" / "step-00000003")
    manifest = checkpoint.open_step(run_dir / "checkpoints" / "step-00000002").manifest
    (folder / "manifest.json").unlink()
    later = dataclasses.replace(manifest.snapshot, step=3)  # attempt 1 goes on writing
    dataclasses.replace(manifest, snapshot=later).write(folder / "manifest.json")
    assert checkpoint.open_step(folder).number == 3
    assert builders.accepted_in(run_dir) == before
    with pytest.raises(claims.Superseded, match="attempt 2 has taken over from this one, attempt 1"):
        old.check_current()
    new.check_current()


def commit_over_a_leftover(mesh, config, run_dir):
    """Attempt 2 writes a step that attempt 1 wrote after it had been replaced; attempt 1 may not write any more."""
    old = builders.first_attempt(run_dir)
    attempt = builders.claimed(run_dir)
    trainer = builders.trainer(mesh, config)
    for _ in range(3):
        trainer.run_step()
    refused = builders.save(trainer, Checkpointer(old, mesh, 1, None))
    saver = Checkpointer(attempt, mesh, 1, None)
    return str(refused), builders.save(trainer, saver).name


def test_an_attempt_commits_over_what_an_older_one_left(run_dir, tiny_model, tmp_path):
    config = builders.config(
        tiny_model, builders.write_records(tmp_path / "records.jsonl"), tmp_path, **builders.SETTINGS
    )
    left_over = run_dir / "checkpoints" / "step-00000003"
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", left_over)
    builders.first_attempt(run_dir).note("end", outcome="failed")
    ((refused, name),) = ranks.run(1, commit_over_a_leftover, config, run_dir)
    assert "attempt 2 has taken over" in refused
    assert name == "step-00000003"
    assert checkpoint.open_step(left_over).manifest.attempt == 2
    assert (run_dir / "checkpoints" / "set-aside-1-step-00000003").is_dir()
    # one to keep, and that is verified: those that attempt 1 left are older
    assert sorted(builders.accepted_in(run_dir)) == ["step-00000003"]


def test_the_manifest_is_plain_and_whole(two_steps):
    manifest = json.loads((two_steps[0] / "checkpoints/step-00000002/manifest.json").read_text())
    assert manifest["step"] == manifest["state"]["step"] == 2
    assert manifest["state"]["consumed"] == 12
    assert manifest["state"]["optimizer"] == {"step": 2.0, "refreshes": 1}
    assert manifest["row_bounds"]["50"] == [0, 25, 50]
    parameter = manifest["parameters"]["model.layers.0.mlp.down_proj.weight"]
    assert (parameter["shape"], parameter["dtype"], parameter["principal"]) == (
        [50, 93],
        "float32",
        round(0.05 * 50 * 93),
    )
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in manifest["files"].values())
