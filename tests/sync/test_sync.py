"""Versions of a run's weights: readers hold the writer's to the bit, whatever is killed, missing, damaged or full."""

import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import builders
import published
import pytest
import torch
from commands import ROOT
from published import state, stream, whole, writer
from transformers import AutoModelForCausalLM

from liftdist import files, preflight
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import bits
from liftdist.deltas.of_run import by_tensor
from liftdist.engine.principal import PrincipalWeights
from liftdist.errors import UserError
from liftdist.models.weights import ModelFolder
from liftdist.runs.checkpoint import touched_of
from liftdist.schema import Config
from liftdist.sync import checkpoints, reader, version
from liftdist.sync import folder as folders
from liftdist.sync import state as states
from liftdist.sync.reader import Follower, Unreachable
from liftdist.sync.version import CHANGES, FULL
from liftdist.training import publish


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return builders.llama(tmp_path_factory.mktemp("model") / "base", dtype=torch.bfloat16)


class Reader:
    """Follows a folder with all weights in memory, as a server would."""

    def __init__(self, folder, base):
        self.follower = Follower(folder, stream(base).base)
        self.tensors = whole(base, 0)

    def update(self):
        changes = self.follower.update()
        if changes is not None:
            reader.write_into(self.tensors, changes)
            reader.check(self.tensors, self.follower)
        return changes


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(bits(tensor), bits(expected[name].contiguous())), name


def trained_state(principal, model):
    """The state of a model in training, as its run publishes it."""
    held, found = principal.state_dict(), {}
    for name in by_tensor({matrix.name: matrix.name for matrix in principal.matrices}, {}):
        part = {key.rpartition("/")[2]: tensor for key, tensor in held.items() if key.startswith(f"{name}/")}
        found[name] = checkpoints.weights_of(model, name, *touched_of([part], torch.bfloat16))
    return found


def test_readers_hold_the_weights_of_a_trainer_through_200_steps_and_refreshes(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    principal = PrincipalWeights(model, density=0.05, filter_rank=4)
    optimizer = torch.optim.AdamW([principal.values], lr=3e-3, weight_decay=0.0)
    stored, chance = ModelFolder(base), random.Random(0)
    torch.manual_seed(0)
    every, some, late = (Reader(tmp_path / "S", base) for _ in range(3))
    grown = 0
    with writer(tmp_path / "S", base, keep=4, full_interval=3) as made:
        for step in range(1, 201):
            if step % 17 == 0:
                principal.refresh(optimizer)
            tokens = torch.randint(0, 257, (2, 16))
            model(tokens, labels=tokens).loss.backward()
            principal.reduce_gradients()
            optimizer.step()
            principal.write_back()
            before = made.state
            made.publish(step, trained_state(principal, stored))
            grown += step > 1 and any(held.support is not made.state[name].support for name, held in before.items())
            params = dict(model.named_parameters())
            held = {name: params[name].detach() for name in every.tensors}
            readers = [every] + [some] * (chance.random() < 0.2) + [late] * (step % 60 == 0)
            for one in readers:
                one.update()
                assert one.follower.version.step == step
                assert not one.follower.problems
                assert_equal(one.tensors, held)
    assert grown == 11  # at the refreshes alone
    left = version.numbers(tmp_path / "S")
    assert left == [197, 198, 199, 200]
    assert [number for number in left if (version.path_of(tmp_path / "S", number) / FULL).exists()] == [198]


def test_a_reader_takes_the_full_delta_around_what_is_missing_or_damaged(base, tmp_path):
    readers = [Reader(tmp_path / "S", base) for _ in range(5)]
    with writer(tmp_path / "S", base) as made:
        for step in range(1, 5):
            made.publish(step, state(base, step))
            for one in readers if step == 2 else ():
                one.update()

    def flip(path, place=-3):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    damage = {
        "a changed bit": lambda folder: flip(folder / CHANGES),
        "a cut file": lambda folder: (folder / CHANGES).write_bytes((folder / CHANGES).read_bytes()[:-9]),
        "a changed digest": lambda folder: flip(folder / "manifest.json", 200),
        "a missing file": lambda folder: (folder / CHANGES).unlink(),
        "a missing version": shutil.rmtree,
    }
    for behind, (name, do) in zip(readers, damage.items(), strict=True):
        folder = behind.follower.folder = shutil.copytree(tmp_path / "S", tmp_path / name)
        assert behind.follower.version.number == 2
        do(version.path_of(folder, 3))
        behind.update()
        assert behind.follower.version.number == 4, name
        assert_equal(behind.tensors, whole(base, 4))

    folder = (
        tmp_path / "S"
    )  # now the newest is damaged and nothing leads past it: the one before is read, the rest comes later
    behind, ahead = Reader(folder, base), Reader(folder, base)
    ahead.update()
    for path in version.path_of(folder, 4).glob("*.safetensors"):
        flip(path)
    behind.update()
    assert behind.follower.version.number == 3
    assert any("damaged" in problem for problem in behind.follower.problems)
    assert_equal(behind.tensors, whole(base, 3))
    with pytest.raises(Unreachable, match="version 3 is kept"):
        behind.update()
    with pytest.raises(UserError, match="version-00000004.*damaged: .*; give a new folder"):
        writer(folder, base)
    shutil.rmtree(version.path_of(folder, 4))
    with writer(folder, base) as made:
        made.publish(5, state(base, 5))
    assert behind.update()
    assert_equal(behind.tensors, whole(base, 5))
    with pytest.raises(UserError, match="other versions than those followed"):  # number 4 is another one now
        ahead.update()


def test_what_is_unlike_is_refused(base, tmp_path):
    folder = tmp_path / "S"
    with pytest.raises(UserError, match="no such folder"):
        Follower(folder).update()
    with writer(folder, base) as made:
        assert Follower(folder).update() is None
        made.publish(1, state(base, 1))
        bad = state(base, 2)
        next(iter(bad.values())).values[0] = torch.nan
        with pytest.raises(UserError, match="step 2 is not published: .* not finite"):
            made.publish(2, bad)
        assert made.publish(2, state(base, 2)).number == 2
    with pytest.raises(UserError, match="another base model") as refused:
        Follower(folder, "0" * 64).update()
    assert refused.type is UserError  # and no later look will succeed
    for other in (dict(id="two", run="other"), dict(base="0" * 64)):
        with pytest.raises(UserError, match=r"versions of another (run|base model) \(mine\); give a new folder"):
            writer(folder, base, stream=stream(base, **other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(UserError, match="other files"):
        writer(tmp_path / "full", base)

    one = Reader(folder, base)
    changes = one.follower.update()
    name = next(iter(changes))
    tensors = whole(base, 0)
    for bad, problem in (
        (tensors | {name: tensors[name][:3]}, "is \\[3, "),
        (tensors | {name: tensors[name].half()}, "float16 does not hold values of torch.bfloat16"),
        ({key: tensor for key, tensor in tensors.items() if key != name}, "no such tensor"),
    ):
        with pytest.raises(UserError, match=problem):
            reader.write_into(bad, changes)
    assert_equal(tensors, whole(base, 0))  # nothing was written
    reader.write_into(one.tensors, changes)
    one.tensors[name].view(-1)[changes[name].indices[0]] += 1
    with pytest.raises(UserError, match="does not hold version 2"):
        reader.check(one.tensors, one.follower)

    rebuilt = tmp_path / "rebuilt"
    with writer(rebuilt, base, stream=stream(base, id="two", run="other")) as made:
        for step in (1, 2):
            made.publish(step, state(base, step))
        shutil.rmtree(folder)
        for more in (False, True):  # as many versions as were followed, and one more
            if more:
                made.publish(3, state(base, 3))
            shutil.copytree(rebuilt, folder, dirs_exist_ok=True)
            with pytest.raises(
                UserError, match="holds versions of run other now, not of mine; .* follow anew"
            ) as refused:
                one.update()
            assert refused.type is UserError


def test_a_run_that_went_back_gives_base_values_back(base, tmp_path):
    one = Reader(tmp_path / "S", base)
    with writer(tmp_path / "S", base, full_interval=100) as made:
        for step in (4, 12, 3):  # 12 has changed more weights than 3
            made.publish(step, state(base, step))
            one.update()
            assert_equal(one.tensors, whole(base, step))
    late = Reader(tmp_path / "S", base)
    late.update()
    assert_equal(late.tensors, whole(base, 3))


def test_a_tensor_of_which_nothing_is_trained_is_none_of_a_version(base, tmp_path):
    one = Reader(tmp_path / "S", base)
    for step in (1, 2, 3):  # each by a writer that reads what the one before has left
        found = state(base, 1)
        name, held = next(iter(found.items()))
        if step != 2:
            found[name] = checkpoints.weights_of(
                ModelFolder(base), name, held.support.indices[:0].long(), held.values[:0]
            )
        with writer(tmp_path / "S", base) as made:
            made.publish(step, found)
        one.update()
        assert not one.follower.problems
        expected = whole(base, 1)
        if step != 2:
            expected[name] = whole(base, 0)[name]
        assert_equal(one.tensors, expected)


def test_a_run_that_goes_on_in_another_dtype_publishes_all_of_its_values(base, tmp_path):
    one = Reader(tmp_path / "S", base)
    one.tensors = {name: tensor.float() for name, tensor in one.tensors.items()}
    steps = (1, 2, 6, 7)  # at 6 and 7 more weights than before
    with writer(tmp_path / "S", base, full_interval=100) as made:
        for step, dtype in zip(steps, (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32), strict=True):
            found = {
                name: states.Weights(held.support, held.values.to(dtype)) for name, held in state(base, step).items()
            }
            made.publish(step, found)
            one.update()
            assert_equal(one.tensors, {name: tensor.float() for name, tensor in whole(base, step).items()})
            assert {held.values.dtype for held in one.follower.state.values()} == {dtype}


def test_a_folder_that_was_begun_anew_and_changes_fewer_tensors_is_refused(base, tmp_path):
    folder, one = tmp_path / "S", Reader(tmp_path / "S", base)
    with writer(folder, base) as made:
        made.publish(1, state(base, 1))
    one.update()
    shutil.rmtree(folder)
    fewer = dict(list(state(base, 1).items())[1:])
    with writer(folder, base, keep=1) as made:
        for step in (1, 2, 3, 4):
            made.publish(step, fewer)
    before = one.follower.state
    with pytest.raises(UserError, match="version 4 has lost weights that version 1 had changed; .* follow anew"):
        one.update()
    assert one.follower.state is before


def test_ranks_send_what_is_trained_of_a_matrix_and_not_the_vector_that_it_is_part_of(monkeypatch):
    vector, sent = torch.arange(20_000.0), []
    publisher = object.__new__(publish.Publisher)
    publisher._mesh = SimpleNamespace(device_mesh=SimpleNamespace(size=lambda _: 1), rank=0, world_size=1, is_main=True)
    publisher._method = SimpleNamespace(weights=lambda: {f"{n}/values": vector[n : n + 10] for n in range(50)})
    monkeypatch.setattr(publish.dist, "gather_object", lambda mine, found, dst: sent.append(mine))
    publisher._gathered()
    assert len(pickle.dumps(sent[0])) < vector.nbytes
    assert torch.equal(sent[0]["7/values"], vector[7:17])


def test_a_folder_that_follows_a_run_in_float32_is_loaded_as_what_it_trained(base, tmp_path):
    fine = {
        name: states.Weights(held.support, held.values.float() * (1 + 2**-12)) for name, held in state(base, 1).items()
    }
    with writer(tmp_path / "S", base) as made:
        made.publish(1, fine)
    folders.follow(tmp_path / "S", base, tmp_path / "out", "hf", tmp_path / "cache", True, print)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, held in fine.items():
        assert torch.equal(model.get_parameter(name).flatten()[held.support.indices.long()], held.values)


def test_where_and_beside_what_a_folder_follows(base, tmp_path, monkeypatch):
    source, cache, out = tmp_path / "S", tmp_path / "cache", tmp_path / "disk" / "out"
    out.parent.mkdir()

    def follow(step, target, form="hf"):
        with writer(source, base) as made:
            made.publish(step, state(base, step))
        given = [Path(os.path.relpath(path)) for path in (source, base)]
        said = []
        folders.follow(*given, target, form, cache, True, said.append)
        assert said == [f"{target}: version {made.version.number}, step {step}"]
        stored = ModelFolder(out)
        assert_equal({name: stored.read(name) for name in stored.file_of}, whole(base, step))

    left, others = (
        out.with_name(".out-0123abcd"),
        (".out-0123abc", ".out-0123abcd-1", ".other-0123abcd", "out-0123abcd"),
    )
    shutil.copytree(base, left)
    for name in others:
        out.with_name(name).mkdir()
    out.with_name(".out-ffffffff").write_text("")
    kept = sorted((*others, ".out-89abcdef", ".out-ffffffff", "out"))
    out.with_name(".out-89abcdef").mkdir()
    with files.locked(out.with_name(".out-89abcdef")):  # of one that lives
        follow(1, out)
    assert sorted(path.name for path in out.parent.iterdir()) == kept

    link = tmp_path / "link"
    link.symlink_to("disk/out")
    follow(2, link)
    assert link.is_symlink()
    monkeypatch.chdir(out)
    follow(3, Path())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for form in ("hf", "sglang"):
        with pytest.raises(UserError, match="file: exists, and is no folder that this command has written"):
            follow(4, Path("file"), form)
    with files.locked(out), pytest.raises(UserError, match="out: another process is changing it"):
        follow(5, out)


def test_changes_cost_what_has_changed(base, tmp_path):
    before = state(base, 1)
    name, held = next(iter(before.items()))
    size = held.values.numel()

    def written(places):
        values = held.values.clone()
        values[places] += 1
        after = before | {name: states.Weights(held.support, values)}
        states.write_changes(before, after, tmp_path / "changes")
        assert torch.equal(states.read_changes(before, tmp_path / "changes")[name].values, values)
        file = states.TensorFile(tmp_path / "changes")
        return {key: int(torch.Size(entry["shape"]).numel()) for key, entry in file.entries.items()}

    assert written(torch.arange(size)) == {f"{name}.values": size}  # no index where all have changed
    few = written(torch.arange(0, size, 7))
    assert few[f"{name}.values"] == -(-size // 7)
    assert few[f"{name}.places"] <= few[f"{name}.values"] + 8
    assert written(torch.arange(0)) == {}
    written(torch.arange(size))
    with pytest.raises(ValueError, match="at indices that it does not hold"):
        states.read_changes({}, tmp_path / "changes")


def test_a_full_delta_is_one_that_apply_takes(base, tmp_path):
    with writer(tmp_path / "S", base) as made:
        for step in (1, 2):
            made.publish(step, state(base, step))
    delta = delta_file.read(version.path_of(tmp_path / "S", 2) / FULL)
    assert dict(delta.made) == {"run": "mine", "step": 2}
    tensors = whole(base, 0)
    reader.write_into(tensors, {name: delta.get(name) for name in delta.names})
    assert_equal(tensors, whole(base, 2))


def start(folder, base, last, **settings):
    command = [sys.executable, published.__file__, folder, base, last]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=ROOT, **settings)
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_process_writes_and_it_may_be_killed_at_any_moment(base, tmp_path, monkeypatch):
    folder, chance = tmp_path / "S", random.Random(1)
    one, accepted = Reader(folder, base), []
    for kill in range(5):
        process = start(folder, base, 10**6)
        if not kill:
            with pytest.raises(UserError, match=f"process {process.pid} on .* publishes there; stop it"):
                writer(folder, base)
        end = time.monotonic() + 0.3 + 0.5 * chance.random()
        while time.monotonic() < end:
            if one.update():
                accepted.append(one.follower.version.step)
                assert_equal(one.tensors, whole(base, accepted[-1]))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert accepted == sorted(set(accepted))
    assert len(accepted) > 5
    with writer(folder, base) as made:  # nothing of the dead is in the way, nor left
        assert not list(folder.glob(".*"))
        step = made.publish(made.version.step + 1, state(base, made.version.step + 1)).step
    one.update()
    assert_equal(one.tensors, whole(base, step))

    def unlockable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlockable)  # on such a file system the second one to publish a version fails
    with writer(folder, base) as first, writer(folder, base) as second:
        first.publish(step + 1, state(base, step + 1))
        with pytest.raises(UserError, match="another process has published it"):
            second.publish(step + 2, state(base, step + 2))
    one.update()
    assert_equal(one.tensors, whole(base, step + 1))


def test_a_full_disk_leaves_whole_versions_and_the_writer_goes_on(base, small_disk):
    folder = small_disk / "S"
    one = Reader(folder, base)
    with writer(folder, base) as made:
        made.publish(1, state(base, 1))
        filler = builders.fill(small_disk)
        with pytest.raises(UserError, match="cannot be written: .*No space left on device"):
            made.publish(2, state(base, 2))
        one.update()
        assert_equal(one.tensors, whole(base, 1))
        filler.unlink()
        made.publish(3, state(base, 3))
        one.update()
        assert not list(folder.glob(".*"))
        assert_equal(one.tensors, whole(base, 3))
        assert made.version.number == 2


@pytest.mark.parametrize("form", ["hf", "sglang"])
def test_a_full_disk_leaves_what_follows_a_run_as_it_was(form, base, small_disk, tmp_path):
    source, target = tmp_path / "S", small_disk / "out"

    def follow(step):
        said = []
        folders.follow(source, base, target, form, tmp_path / "cache", True, said.append)
        assert said == [f"{target}: version {step}, step {step}"]
        return {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}

    def refused():
        filler = builders.fill(small_disk)
        with pytest.raises(UserError, match="cannot be written: .*No space left on device") as caught:
            follow(2)
        assert "\n" not in str(caught.value)
        filler.unlink()
        return [path for path in small_disk.rglob("*") if path.is_file()]

    with writer(source, base) as made:
        made.publish(1, state(base, 1))
        assert refused() == []
        held = follow(1)
        made.publish(2, state(base, 2))
        assert set(refused()) == set(held)
        assert {path: path.read_bytes() for path in held} == held
        found = follow(2)
    if form == "hf":
        stored = ModelFolder(target)
        assert_equal({name: stored.read(name) for name in stored.file_of}, whole(base, 2))
    else:
        assert {path: found[path] for path in held} == held
        assert len(found) == 2 * len(held)


def test_a_limit_on_file_sizes_is_an_error_as_a_full_disk_is(base, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with writer(tmp_path / "S", base) as made:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            with pytest.raises(UserError, match="cannot be written: .*File too large"):
                made.publish(1, state(base, 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        made.publish(1, state(base, 1))
    one = Reader(tmp_path / "S", base)
    one.update()
    assert_equal(one.tensors, whole(base, 1))


def test_a_reader_imports_neither_transformers_nor_fsdp():
    code = "import sys, json, liftdist.sync.reader; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = json.loads(run.stdout)
    assert "torch" in loaded
    assert [name for name in loaded if name.startswith(("transformers", "torch.distributed.fsdp", "omegaconf"))] == []


def test_a_run_is_told_before_it_starts_that_it_cannot_publish_there(base, tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    preflight.check_sync(config)
    config.sync.to = str(tmp_path / "S")
    preflight.check_sync(config)
    with writer(tmp_path / "S", base) as made:
        preflight.check_sync(config)  # no version yet
        made.publish(1, state(base, 1))
    with pytest.raises(UserError, match=r"sync.to .*/S: holds versions of another run \(mine\); give a new folder"):
        preflight.check_sync(config)
    (tmp_path / "file").touch()
    for other, problem in ((base, "holds other files than versions"), (tmp_path / "file", "is a file")):
        config.sync.to = str(other)
        with pytest.raises(UserError, match=problem):
            preflight.check_sync(config)
