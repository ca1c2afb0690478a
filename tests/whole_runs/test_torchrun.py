"""Whole jobs under torchrun: ranks that are killed or hang, and signals to every process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import builders
import hooks
import pytest
import ranks
from commands import write_job_config
from jobs import command, is_alive, ranks_of, read_until, wait_until

from liftdist import config as configs
from liftdist.runs import checkpoint, saver
from liftdist.runs.stop import StopRequests


def torchrun(config, *options, overrides=()):
    """Start a job of two ranks under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    return subprocess.Popen(
        [*command, "-m", "liftdist.train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def test_a_killed_rank_a_second_job_and_a_restart(tiny_model, tmp_path):
    """A rank is killed mid-step: its peer goes, torchrun starts both again, and the end is that of an undisturbed run."""
    config = write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), steps=400)
    job = torchrun(config, "--standalone", "--max-restarts", "2")
    read_until(job, "training 12/400")
    second = subprocess.run(
        [sys.executable, "-m", "liftdist", "train", str(config), "--nproc", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert "in use by process" in second.stderr
    first = ranks_of(config)
    os.kill(first[1], signal.SIGKILL)
    wait_until(lambda: not is_alive(first[0]))
    said = read_until(job, "training ")
    assert "continuing after step" in said or "continuing after step" in read_until(job, "continuing after step")
    (tmp_path / "run" / "stop-requested").touch()
    rest = job.communicate(timeout=60)[0]
    assert "stopped (stop-requested); the same command continues" in rest
    assert not (tmp_path / "run" / "stop-requested").exists()
    stopped_at, files = builders.files_of(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "disturbed")
    (undisturbed,) = set(ranks.run(2, run_to, config, stopped_at))
    assert undisturbed == json.dumps(files)


def run_to(mesh, config, step):
    """The checkpoint of ``step`` in an undisturbed run."""
    loaded, text = configs.load(config)
    stop = StopRequests()

    def stop_there(_, checkpointer, state, matrices, snapshot):
        if snapshot.step == step:
            stop.reason = "there"

    loaded.checkpoint.interval = 1 if step % 5 else 5
    with hooks.around(saver.Checkpointer, "save", after=stop_there):
        builders.run_once(mesh, loaded, text, stop=stop)
    files = checkpoint.open_step(Path(loaded.run_dir) / "checkpoints" / f"step-{step:08d}").manifest.files
    return json.dumps({name: file.sha256 for name, file in files.items()})


@pytest.mark.parametrize("through", ["torchrun", pytest.param("liftdist", marks=pytest.mark.slow)])
def test_no_rank_outlives_its_agent(through, tiny_model, tmp_path):
    config = write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), steps=100000)
    job = torchrun(config, "--standalone") if through == "torchrun" else command(config)
    read_until(job, "training 2/")
    pids = ranks_of(config)
    assert sorted(pids) == [0, 1]
    job.kill()
    wait_until(lambda: not any(map(is_alive, pids.values())))
    job.communicate()


def test_signals_to_every_process_of_a_job_stop_it_once(tiny_model, tmp_path):
    """As schedulers send them: to the command, to torchrun and to the ranks, one after the other and again."""
    config = write_job_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), steps=100000)
    job = command(config)
    read_until(job, "training 2/")
    agent = int(Path(f"/proc/{ranks_of(config)[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for pid in (agent, *ranks_of(config).values(), job.pid):
            os.kill(pid, number)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75, said
    assert said.count("liftdist: stopped (SIG") == 1  # whichever of them is handled first
    assert "Traceback" not in said
    assert builders.files_of(tmp_path / "run")[0] >= 2


def test_a_rank_that_hangs_is_reported_with_the_stacks_of_the_others(tiny_model, tmp_path):
    config = write_job_config(
        tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"), steps=100000, hang_timeout=3
    )
    job = torchrun(config, "--standalone")
    read_until(job, "training 2/")
    pids = ranks_of(config)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        said = read_until(job, "no progress for 3 s") + read_until(job, "ranks are waiting")
    finally:
        os.kill(pids[1], signal.SIGKILL)
    job.communicate(timeout=60)
    assert "1 of 2 ranks are waiting" in said
    assert "rank 1 wrote no stacks: check whether the process and its machine are alive" in said
    stacks = (tmp_path / "run" / "hang-1" / "rank-00000.txt").read_text()
    assert "in turn\n" in stacks
    assert "Thread 0x" in stacks
