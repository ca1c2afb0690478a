"""Real runs that publish versions, from their ranks and from their checkpoints, and folders that follow them."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import builders
import commands
import pytest
import ranks
import torch
from commands import ROOT, liftdist

from liftdist.deltas.delta import bits
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.models.weights import ModelFolder
from liftdist.runs import claims
from liftdist.sync import checkpoints, reader, version
from liftdist.sync.reader import Follower
from liftdist.sync.writer import Writer


def tensors_of(folder):
    stored = ModelFolder(folder)
    return {name: stored.read(name) for name in stored.file_of}


def assert_follows_to(source, base, expected):
    """A reader that holds the base model holds the expected model after one look."""
    tensors, follower = tensors_of(base), Follower(source, weights.digest(base, source.parent / "cache"))
    reader.write_into(tensors, follower.update())
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(bits(tensors[name]), bits(tensor)), name
    return follower.version


@pytest.fixture(scope="module")
def base(tmp_path_factory, smollm2):
    return builders.llama(tmp_path_factory.mktemp("model") / "base", smollm2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("method", "world_size", "replicas"), [("lift", 4, 2), ("full", 2, 1)], ids=["lift on 2 x 2 ranks", "full"]
)
def test_ranks_publish_what_the_run_exports(base, records, tmp_path, method, world_size, replicas, monkeypatch):
    config = builders.config(
        base, records, tmp_path,
        model=dict(dtype="bfloat16"),
        selection=dict(refresh_interval=2 if method == "lift" else 0),
        mesh=dict(dp_replicate=replicas),
        train=dict(steps=5),
        sync=dict(to=str(tmp_path / "S"), interval=2),
    )  # fmt: skip
    config.method = method
    assert set(ranks.run(world_size, builders.run_once, config, dp_replicate=replicas)) == {"finished"}
    run, folder = tmp_path / "run", tmp_path / "S"
    assert [version.read(version.path_of(folder, number)).step for number in version.numbers(folder)] == [2, 4, 5]
    published = assert_follows_to(folder, base, run / "export")

    said = liftdist("sync", run, "--to", tmp_path / "T", "--once", "--base", base, "--cache-dir", tmp_path / "cache")
    assert said.splitlines()[-1] == f"{tmp_path}/T holds version 1, of step 5"
    same = assert_follows_to(tmp_path / "T", base, run / "export")
    assert (same.stream, same.state) == (published.stream, published.state)  # one run, the same weights

    shutil.copytree(run / "checkpoints", tmp_path / "kept")

    def writer(source, *arguments, make=checkpoints._Source.writer):
        shutil.rmtree(run / "checkpoints")  # as a run removes old ones, while they are read
        return make(source, *arguments)

    said = []
    monkeypatch.setattr(checkpoints._Source, "writer", writer)
    with pytest.raises(UserError, match="holds no checkpoint that could be published"):
        checkpoints.publish(run, tmp_path / "U", base, tmp_path / "cache", 10, 1, False, said.append)
    assert "was removed during the export" in said[0]  # and others were waited for

    def begun_anew(source, *arguments, make=checkpoints._Source.writer):
        made = make(source, *arguments)
        monkeypatch.setattr(claims, "identity", lambda _: "another")
        return made

    monkeypatch.undo()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    shutil.copytree(tmp_path / "kept", run / "checkpoints")
    monkeypatch.setattr(checkpoints._Source, "writer", begun_anew)
    with pytest.raises(UserError, match="is another run than when this began; publish it in a new folder"):
        checkpoints.publish(run, tmp_path / "V", base, tmp_path / "cache", 10, 1, True, said.append)
    assert version.numbers(tmp_path / "V") == []

    monkeypatch.undo()
    shutil.copytree(tmp_path / "kept", run / "checkpoints", dirs_exist_ok=True)
    newest = iter([checkpoints._newest(run, claims.attempts(run))])  # and then one that cannot be read
    monkeypatch.setattr(checkpoints, "_newest", lambda *_: next(newest, ("step-00000009", "f" * 64)))
    with pytest.raises(
        UserError, match="step-00000009, the newest checkpoint, could not be published; .* holds step 5"
    ):
        checkpoints.publish(run, tmp_path / "W", base, tmp_path / "cache", 10, 1, False, said.append)


def start(*words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "liftdist", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_and_those_who_follow_are_killed_and_go_on(base, records, tmp_path):
    ours, theirs, folder = tmp_path / "S", tmp_path / "T", tmp_path / "followed"
    config = commands.write_config(
        tmp_path, base, records,
        data=dict(eval_path=None),
        train=dict(steps=30, eval_interval=0),
        checkpoint=dict(interval=7),
        sync=dict(to=str(ours), interval=3),
    )  # fmt: skip
    settings = config.read_text().replace("dtype: float32", "dtype: bfloat16")
    config.write_text(settings)
    train = ("train", config, "--nproc", 2)
    cache = ("--cache-dir", tmp_path / "cache")
    follow = ("follow", ours, "--base", base, "--output", folder, *cache)
    sync = ("sync", tmp_path / "run", "--to", theirs, *cache)

    ours.mkdir()
    run, publishing, following = start(*train), start(*sync), start(*follow)
    wait_for(lambda: len(version.numbers(theirs)) >= 1 and folder.exists(), run)
    for process in (run, publishing, following):
        kill(process)
    before = max(version.numbers(ours))
    held = {ours: Follower(ours), theirs: Follower(theirs)}
    for follower in held.values():
        follower.update()
    weights.digest(folder, tmp_path / "cache")  # a whole model

    publishing, following = start(*sync), start(*follow)
    said = commands.run_command(*train)
    assert said.returncode == 0, said.stdout
    assert "continuing after step" in said.stdout
    assert f"version {before + 1}: step " in said.stdout
    output, _ = publishing.communicate(timeout=60)
    assert publishing.returncode == 0, output
    assert output.splitlines()[-1].endswith(", of step 30")
    wait_for(lambda: tensors_equal(folder, tmp_path / "run" / "export"), following, 30)
    following.send_signal(signal.SIGINT)
    output, _ = following.communicate(timeout=30)
    assert following.returncode == 0, output
    assert "Traceback" not in output
    for follower in held.values():  # readers that saw versions of both attempts
        follower.update()
        assert follower.version.step == 30
    assert held[ours].version.state == held[theirs].version.state
    assert_follows_to(ours, base, tmp_path / "run" / "export")
    (tmp_path / "mine").mkdir()
    other = ("follow", ours, "--base", base, "--output", tmp_path / "mine", *cache)
    assert "no folder that this command has written" in liftdist(*other, code=2)


def run_to_a_full_disk(mesh, config):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "S")

    Writer.publish = full
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        builders.run_once(mesh, config)
    return said.getvalue()


def test_a_last_version_that_is_not_published_is_named_with_the_command_that_does(base, records, tmp_path):
    to = tmp_path / "S"
    config = builders.config(base, records, tmp_path, train=dict(steps=2), sync=dict(to=str(to), interval=1))
    (said,) = ranks.run(1, run_to_a_full_disk, config)
    assert "SYNC FAILED, training continues: S: No space left on device" in said
    command = f"liftdist sync {tmp_path / 'run'} --to {to} --once"
    assert f"SYNC FAILED, step 2 is not published: S: No space left on device; `{command}` publishes it" in said
    liftdist(*command.split()[1:], "--base", base, "--cache-dir", tmp_path / "cache")
    assert version.read(version.path_of(to, 1)).step == 2


def tensors_equal(folder, expected):
    found, wanted = tensors_of(folder), tensors_of(expected)
    return all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in wanted.items())
