"""Runs that are disturbed while their ranks tokenise, each with processes of its own."""

import json
import os
import re
import signal

import pytest
from commands import run_command, user_error, write_config
from jobs import command, is_alive, ranks_of, tokenisers_of, wait_until

from liftdist.data import parts


def write(path, count, repeat=1):
    """Records of a conversation each."""
    with path.open("w") as file:
        for n in range(count):
            turns = [
                {"role": role, "content": f"{n} " * repeat} for _ in range(repeat) for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def config(tiny_model, tmp_path):
    path = write(tmp_path / "records.jsonl", 8 * parts.RECORDS + 1)
    return write_config(tmp_path, tiny_model, path, data=dict(eval_path=None), train=dict(steps=2, eval_interval=0))


def folder_of(config):
    return next((config.parent / "cache" / "tokens").iterdir())


def left_in(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def tokenisers(config):
    return [pid for rank in ranks_of(config).values() for pids in tokenisers_of(rank) for pid in pids]


def begun(config, *words):
    """A run of one rank, once it has tokenised some part by several processes; and these."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    job = command(config, "--nproc", "1", *words)
    wait_until(
        lambda: (
            (any((config.parent / "cache").glob("tokens/*/part-*")) and tokenisers(config)) or job.poll() is not None
        )
    )
    found = tokenisers(config)
    assert len(found) >= 3, job.communicate()[0]
    return job, found


def test_a_bad_record_far_into_the_file_ends_all_ranks_with_its_line(tiny_model, tmp_path):
    path = write(tmp_path / "records.jsonl", 2 * parts.RECORDS + 10)
    lines = path.read_text().splitlines()
    lines[4099] = "{"
    path.write_text("\n".join(lines))
    config = write_config(tmp_path, tiny_model, path, data=dict(eval_path=None))
    run = run_command("train", config, "--nproc", 2)
    assert user_error(run).startswith(f"liftdist: {path}:4100: not JSON")
    assert not left_in(folder_of(config))


@pytest.mark.slow
def test_a_stop_while_ranks_tokenise_keeps_the_parts_that_are_complete(config):
    job, found = begun(config)
    for rank in ranks_of(config).values():
        os.kill(rank, signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75, said
    assert "liftdist: stopped (SIGTERM); the same command continues" in said
    assert not any(map(is_alive, found))
    folder = folder_of(config)
    before = {part: part.stat().st_ino for part in folder.glob("part-*")}
    assert not left_in(folder)
    assert 0 < len(before) < 9
    said = run_command("train", config, "--nproc", 1)
    assert said.returncode == 0, said.stdout
    assert {part: part.stat().st_ino for part in before} == before
    assert parts.complete(folder) == set(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["rank", "worker"])
def test_a_process_that_is_killed_ends_the_run_and_leaves_none_behind(which, config):
    job, found = begun(config)
    os.kill(ranks_of(config)[0] if which == "rank" else found[-1], signal.SIGKILL)
    said = job.communicate(timeout=60)[0]
    assert "killed by SIGKILL, as the kernel does when memory runs out" in said
    assert (job.returncode == 2) == (which == "worker"), said
    wait_until(lambda: not any(map(is_alive, found)))
    wait_until(lambda: not left_in(folder_of(config)))


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--nproc", "1"), ("--nproc", "2")])
def test_tokenising_beats_the_watchdog_and_shows_the_time_that_is_left(words, tiny_model, tmp_path):
    path = write(tmp_path / "records.jsonl", 12 * parts.RECORDS, 4)
    settings = dict(steps=1, eval_interval=0, hang_timeout=6, export=False)
    config = write_config(tmp_path, tiny_model, path, data=dict(eval_path=None), train=settings)
    run = run_command("train", config, *words)
    assert run.returncode == 0, run.stdout
    shown = re.findall(rf"tokenising {path}: (\d+) of (\d+) records, \S+/s, 0:\d\d:\d\d left", run.stdout)
    assert shown, run.stdout
    assert all(0 < int(done) <= int(total) == 12 * parts.RECORDS for done, total in shown)
