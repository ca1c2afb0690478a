"""What a rank leaves behind: of which kind its error is, and nothing through a symbolic link."""

import datetime
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import ROOT

from liftdist import failures
from liftdist.failures import Failure

# ---------------------------------------------------------------------------------------------------------------------
# Kinds.


def recorded(folder, error, monkeypatch):
    monkeypatch.setenv("LIFTDIST_FAILURES", str(folder))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(type(error)) as caught:
        raise error
    assert failures.record(caught.value)
    (found,) = failures.read(folder)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "NCCL is misspelt in the config",
        "the socket of this lamp is broken: timeout, connection closed by peer",
        "cannot save: [/somewhere/gloomy.cc:7] Connection closed by peer",
        "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4",
    ],
)
def test_a_bug_is_one_whatever_words_it_uses(text, tmp_path, monkeypatch):
    found = recorded(tmp_path, RuntimeError(text), monkeypatch)
    assert (found.rank, found.world_size, found.kind) == (1, 2, failures.BUG)
    assert found.error == f"RuntimeError: {text}"
    assert "raise error" in found.trace
    assert failures.summary([found]).endswith(found.trace.rstrip())


@pytest.mark.parametrize("kind", [dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError])
def test_what_torch_raises_for_its_network_is_a_lost_peer(kind, tmp_path, monkeypatch):
    assert recorded(tmp_path, kind("whatever it says"), monkeypatch).kind == failures.LOST_PEERS


COLLECTIVES = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
    "wait": lambda: dist.broadcast(torch.ones(3), 2, async_op=True).wait(),  # raised in a frame of our own
    "objects": lambda: dist.all_gather_object([None] * 3, "x"),
    "barrier": dist.barrier,
    "receive": lambda: dist.recv(torch.ones(3), 2),
}


def lose_a_peer(rank, folder, how):
    """Rank 2 of three is killed, or hangs; the others record how each collective fails."""
    store = dist.FileStore(f"{folder}/store", 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=2))
    dist.all_reduce(torch.ones(3))
    if rank == 2:
        if how == "hangs":
            time.sleep(8)
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    for name, collective in COLLECTIVES.items():
        os.environ["LIFTDIST_FAILURES"] = f"{folder}/{name}"
        Path(folder, name).mkdir(exist_ok=True)
        try:
            collective()
        except Exception as error:
            failures.record(error)
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_ranks_that_lose_a_peer_say_so(how, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    processes = [context.Process(target=lose_a_peer, args=(rank, str(tmp_path), how)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL]
    for name in COLLECTIVES:
        found = failures.read(tmp_path / name)
        assert sorted(failure.rank for failure in found) == [0, 1], name
        assert {failure.kind for failure in found} == {failures.LOST_PEERS}, (name, found)
        assert failures.summary(found).startswith("rank 2 ended without a message before the run did; rank ")


def test_a_store_whose_host_has_died_is_a_lost_peer(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import torch.distributed as d, time; s = d.TCPStore('127.0.0.1', {port}, 2, True); time.sleep(60)"
    host = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    store = dist.TCPStore("127.0.0.1", port, 2, False, timeout=datetime.timedelta(seconds=60))
    host.kill()
    host.wait()
    with pytest.raises(RuntimeError) as lost:
        store.get("what nobody has set")
    assert recorded(tmp_path, lost.value, monkeypatch).kind == failures.LOST_PEERS


# ---------------------------------------------------------------------------------------------------------------------
# Files.


def starting(folder, rank=1):
    """A rank that starts, and says something."""
    code = "from liftdist import failures; failures.start(); print('hello')"
    environment = {**os.environ, "LIFTDIST_FAILURES": str(folder), "LIFTDIST_LOGS": str(folder), "RANK": str(rank)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_rank_keeps_its_output_apart_in_a_file_of_its_own(tmp_path):
    for _ in range(2):  # an attempt after the other
        assert starting(tmp_path).returncode == 0
    assert (tmp_path / "rank-00001.log").read_text() == "hello\nhello\n"


@pytest.mark.parametrize("exists", [True, False])
def test_no_output_goes_through_a_planted_link(exists, tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "logs"
    folder.mkdir()
    if exists:
        canary.write_text("untouched")
    (folder / "rank-00001.log").symlink_to(canary)
    ended = starting(folder)
    assert ended.returncode == 2
    assert canary.read_text() == "untouched" if exists else not canary.exists()
    (found,) = failures.read(folder)
    link = f"{folder}/rank-00001.log: is a symbolic link; symbolic links inside a run directory are not followed"
    assert found.kind == failures.USER_ERROR
    assert failures.summary([found]).endswith(link)


def test_no_record_is_read_or_left_through_a_planted_link(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    canary = tmp_path / "canary"
    canary.write_text(json.dumps(asdict(Failure(0, 2, "a", 1.0, "a lie"))))
    (folder / "rank-00000.failure.json").symlink_to(canary)
    (folder / "rank-00001.failure.json").symlink_to(tmp_path / "nothing")
    assert failures.read(folder) == []
    assert not failures.write(folder, Failure(0, 2, "a", 2.0, "the truth"))  # so that the rank tells it itself
    assert not failures.write(folder, Failure(1, 2, "a", 2.0, "the truth"))
    assert "a lie" in canary.read_text()
    assert not (tmp_path / "nothing").exists()
    assert starting(folder, rank=0).returncode == 0  # forgets what has the name of its record
    assert failures.write(folder, Failure(0, 2, "a", 2.0, "the truth"))
    assert [failure.error for failure in failures.read(folder)] == ["the truth"]
    assert "a lie" in canary.read_text()


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "BUG"}, {"kind": 7}, {"time": None}, {"rank": "1"}, {"world_size": 10**15}, {"error": 3}, {"trace": ["x"]},
        {"of another version": 1},
    ],
)  # fmt: skip
def test_what_is_no_record_is_left_out(changed, tmp_path):
    real = Failure(0, 2, "a", 1.0, "KeyError: 'x'")
    assert failures.write(tmp_path, real)
    other = asdict(Failure(1, 2, "a", 2.0, "KeyError: 'y'")) | changed
    (tmp_path / "rank-00001.failure.json").write_text(json.dumps(other))
    (tmp_path / "rank-00002.failure.json").write_text(json.dumps(asdict(real))[:-9])
    assert failures.read(tmp_path) == [real]
    assert failures.summary(failures.read(tmp_path)).startswith("rank 0 on a failed first: KeyError: 'x'")
