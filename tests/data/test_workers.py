"""Tokenising by several processes: the same parts, the same errors, and none of them left behind."""

import copy
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import builders
import hooks
import pyarrow
import pytest
from commands import ROOT, write_config
from jobs import is_alive, tokenisers_of, wait_until
from pyarrow import parquet

from liftdist import environment, processes
from liftdist.data import parts, tokenised
from liftdist.data.chat import Encoder
from liftdist.errors import UserError

COUNT = 2 * parts.RECORDS + 5  # more parts than are made in one process
RECORDS = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(COUNT)]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_jsonl(path):
    path.write_bytes(lines(RECORDS))


def write_gzip(path):
    path.write_bytes(gzip.compress(lines(RECORDS), 1))


def write_array(path):
    path.write_text(json.dumps(RECORDS))


def write_csv(path):
    """With a cell beyond the limit that the module ``csv`` begins with."""
    rows = [f"{r['prompt']},{r['completion']}\n" for r in RECORDS]
    path.write_text("".join(["prompt,completion\n", *rows[:-1], f"short,{'long ' * 40_000}\n"]))


def write_row_group(path):
    """A Parquet file of one row group, which can only be read from its start."""
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


def write_arrow(path):
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)


def write_folder(path):
    """Files whose ends are no ends of parts."""
    path.mkdir()
    for number, (begin, end) in enumerate([(0, 1500), (1500, 1501), (1501, COUNT)]):
        (path / f"{number}.jsonl").write_bytes(lines(RECORDS[begin:end]))


SLOW = ("a.jsonl", "a.json", "a.arrow")  # read as others here are, but for what test_text_files and test_tables test


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


KINDS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.json": write_array,
    "a.csv": write_csv,
    "a.parquet": write_row_group,
    "a.arrow": write_arrow,
    "folder": write_folder,
}


def tokenise(path, tokenizer, cache, count, progress=None, **options):
    config = builders.config(path.parent, path, path.parent).data
    given = config.training_sources[0]
    return tokenised.tokenise(
        given, config, Encoder(tokenizer), 49152, cache, progress=progress, processes=count, **options
    )


def files_in(cache):
    """All files of the parts in a cache, and what else is there."""
    return {
        str(path.relative_to(cache / "tokens")): path.read_bytes()
        for path in cache.rglob("tokens/*/**/*")
        if path.is_file()
    }


def left_in(cache):
    """What is in the folder of the tokens that is no part."""
    return [
        path.name for path in cache.glob("tokens/*/*") if not path.name.startswith("part-") and path.name != "records"
    ]


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in KINDS])
def test_several_processes_write_the_same_bytes_as_one(name, tokenizer, tmp_path):
    KINDS[name](tmp_path / name)
    alone = tokenise(tmp_path / name, tokenizer, tmp_path / "one", 1)
    with hooks.around(parts, "write", before=lambda *_: pytest.fail("a part was made by this process")):
        shared = tokenise(tmp_path / name, tokenizer, tmp_path / "three", 3)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "three")
    assert (len(alone), alone.table[-1], alone.where(COUNT - 1)) == (COUNT, shared.table[-1], shared.where(COUNT - 1))
    assert not left_in(tmp_path / "three")
    assert tokenisers_of(os.getpid()) == ([], [])


def test_few_parts_are_made_without_processes(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS[: 2 * parts.RECORDS]))
    tokenise(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", 4, lambda *_: assert_none())
    assert len(parts.complete(next((tmp_path / "cache" / "tokens").iterdir()))) == 2


def assert_none():
    assert tokenisers_of(os.getpid()) == ([], [])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({4000: '{"prompt": "a"}'}, "a.jsonl:4000: field 'completion' is missing"),
        slow({3000: '{"prompt": "a", '}, "a.jsonl:3000: not JSON"),
        ({4101: '{"prompt": "a", "completion": 3}'}, "a.jsonl:4101: 'completion' must be text, got int"),
        slow({2049: '{"prompt": NaN, "completion": ""}'}, "a.jsonl:2049: NaN is no JSON"),
        ({4100: "[]", 2100: "[]"}, "a.jsonl:2100: must be a JSON object"),
        ({4096: "[]", 4097: "{}"}, "a.jsonl:4096: must be a JSON object"),
    ],
)
def test_the_first_bad_record_is_named_and_no_part_of_a_part_remains(bad, message, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = lines(RECORDS).decode().splitlines()
    for line, text in bad.items():
        texts[line - 1] = text
    path.write_text("\n".join(texts))
    with pytest.raises(UserError, match="^" + str(tmp_path / message)) as found:
        tokenise(path, tokenizer, tmp_path / "cache", 4)
    assert len(str(found.value).splitlines()) == 1
    assert not left_in(tmp_path / "cache")
    assert 0 in parts.complete(next((tmp_path / "cache" / "tokens").iterdir()))
    assert_none()


def test_a_file_that_is_cut_off_is_an_error_of_its_reader(tokenizer, tmp_path):
    write_gzip(tmp_path / "whole.gz")
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a.jsonl.gz: cannot be read: Compressed file ended"):
        tokenise(tmp_path / "a.jsonl.gz", tokenizer, tmp_path / "cache", 3)


def test_a_file_that_changes_is_an_error_of_the_workers(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS) * 4)

    def change(_, total):
        if total and tokenisers_of(os.getpid())[1]:
            path.write_bytes(path.read_bytes() + b"\n")

    with pytest.raises(UserError, match=r"a.jsonl: has changed while it was read"):
        tokenise(path, tokenizer, tmp_path / "cache", 3, change)
    assert not left_in(tmp_path / "cache")


@pytest.mark.parametrize(
    ("which", "number", "kind", "message"),
    [
        (
            "worker",
            signal.SIGKILL,
            UserError,
            r"killed by SIGKILL, as the kernel does when memory runs out; the same command",
        ),
        slow("overseer", signal.SIGKILL, UserError, r"killed by SIGKILL, as the kernel does when memory runs out"),
        slow("worker", signal.SIGSEGV, RuntimeError, r"ended with signal SIGSEGV"),
        ("overseer", signal.SIGABRT, RuntimeError, r"ended with signal SIGABRT"),
    ],
)
def test_a_process_that_is_killed_is_reported_at_once(which, number, kind, message, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS) * 6)
    killed = []

    def kill(*_):
        overseers, found = tokenisers_of(os.getpid())
        if found and not killed:
            assert len(found) == 3
            killed.append((found if which == "worker" else overseers)[0])
            os.kill(killed[0], number)
            killed.append(time.monotonic())

    with pytest.raises(kind, match=message):
        tokenise(path, tokenizer, tmp_path / "cache", 3, kill)
    assert time.monotonic() - killed[1] < 5
    assert not left_in(tmp_path / "cache")
    assert_none()


@pytest.mark.parametrize("count", [slow(1), 3])
def test_a_full_disk_is_one_line_and_leaves_the_parts_that_fit(count, small_disk, tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path)
    (small_disk / "filler").write_bytes(bytes(800 << 10))
    with pytest.raises(UserError, match=r"^cache_dir: .*No space left on device; free some space"):
        tokenise(path, tokenizer, small_disk, count)
    assert not left_in(small_disk)
    (small_disk / "filler").unlink()
    assert len(tokenise(path, tokenizer, small_disk, count)) == COUNT


def test_what_was_left_long_ago_is_removed(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    tokenise(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", 1)
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    for name, age in (("old", 2 * 86400), ("new", 60)):
        (folder / f".parts-{name}" / "part-000000").mkdir(parents=True)
        os.utime(folder / f".parts-{name}", (time.time() - age,) * 2)
    tokenise(tmp_path / "a.jsonl", tokenizer, tmp_path / "cache", 1)
    assert left_in(tmp_path / "cache") == [".parts-new"]


def test_signals_that_reach_all_processes_are_the_ranks_to_hear(tokenizer, tmp_path):
    """As SLURM and terminals send them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS) * 2)
    heard = []

    def send(*_):
        overseers, found = tokenisers_of(os.getpid())
        if overseers and len(heard) < 3:
            heard.append(len(found))
            for pid in overseers + found:
                for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
                    os.kill(pid, signal.Signals[name])

    assert len(tokenise(path, tokenizer, tmp_path / "cache", 3, send)) == 2 * COUNT
    assert heard


def test_what_ends_a_run_ends_its_workers_and_the_next_goes_on_with_what_is_missing(tokenizer, tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_bytes(lines(RECORDS) * 3)

    def stop(done, total):
        if total and tokenisers_of(os.getpid())[1]:
            wait_until(lambda: any(cache.glob("tokens/*/part-*")))
            raise InterruptedError("stop")

    with pytest.raises(InterruptedError):
        tokenise(path, tokenizer, tmp_path / "cache", 2, stop)
    assert_none()
    folder = next((tmp_path / "cache" / "tokens").iterdir())
    before = {part: part.stat().st_ino for part in folder.glob("part-*")}
    assert 0 < len(before) < 3 * COUNT // parts.RECORDS
    assert not left_in(tmp_path / "cache")
    first = []
    tokenise(path, tokenizer, tmp_path / "cache", 2, lambda done, total: first.append(done) if total else None)
    assert first[0] >= len(before) * parts.RECORDS
    assert {part: part.stat().st_ino for part in before} == before


PREFETCH = ("-m", "liftdist", "select", "--prefetch")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, slow(signal.SIGTERM)])
def test_a_command_that_ends_leaves_no_process_and_no_unfinished_part(end, tiny_model, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(RECORDS) * 6)
    config = write_config(tmp_path, tiny_model, path, data=dict(eval_path=None))
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    command = subprocess.Popen(
        [sys.executable, *PREFETCH, str(config)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: len(tokenisers_of(command.pid)[1]) == 2 and left_in(tmp_path / "cache"))
    overseers, found = tokenisers_of(command.pid)
    if end == signal.SIGINT:
        os.killpg(command.pid, end)  # as a terminal does
    else:
        command.send_signal(end)
    said = command.communicate(timeout=30)[0]
    wait_until(lambda: not any(map(is_alive, overseers + found)))
    assert not left_in(tmp_path / "cache")
    assert command.returncode == (-end if end == signal.SIGKILL else 75), said
    assert "Traceback" not in said
    if end != signal.SIGKILL:
        assert f"liftdist: stopped ({end.name}) before training began" in said


def test_a_tokenizer_that_cannot_be_handed_on_is_used_here(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    own.unpicklable = lambda: None
    with pytest.raises(Exception, match="pickle"):
        pickle.dumps(own)
    write_jsonl(tmp_path / "a.jsonl")
    samples = tokenise(tmp_path / "a.jsonl", own, tmp_path / "cache", 3)
    assert len(samples) == COUNT
    assert any(line.startswith(f"{tokenised.ALONE}: ") for line in samples.report.lines())


def test_a_tokenizer_whose_copy_is_another_is_used_here(tokenizer, tmp_path):
    own = copy.deepcopy(tokenizer)
    encoder = Encoder(own)
    encoder.template = Changing("{{ messages[0]['content'] }}")
    write_jsonl(tmp_path / "a.jsonl")
    config = builders.config(tmp_path, tmp_path / "a.jsonl", tmp_path).data
    samples = tokenised.tokenise(config.training_sources[0], config, encoder, 49152, tmp_path / "cache", processes=3)
    assert f"{tokenised.ALONE}: ValueError: its copy is not the same" in samples.report.lines()


class Changing(str):
    """A text that pickling changes."""

    def __reduce__(self):
        return str, (self + " and more",)


@pytest.mark.parametrize(
    ("files", "of", "limit"),
    [
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "100000 100000\n"}, "0::/\n", 1),
        ({"job/step/cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, "0::/job/step\n", 1),
        ({"cpu.max": "50000 100000\n"}, "0::/outside/of/this/container\n", 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", None),
        ({"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "4:cpu:/a\n3:cpuset:/\n", 1),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "1\n", "cpu,cpuacct/cpu.cfs_period_us": "1\n"}, "4:cpu,cpuacct:/\n", 1),
    ],
)  # fmt: skip
def test_cores_are_those_that_the_process_may_use(files, of, limit, tmp_path):
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "of").write_text(of)
    assert processes.cores(tmp_path / "groups", tmp_path / "of") == (limit or len(os.sched_getaffinity(0)))


def test_ranks_divide_the_cores_that_they_may_use(tmp_path):
    code = "from liftdist.data import workers; print(workers.for_each_rank())"

    def count(*bound, **variables):
        names = {environment.LOCAL_WORLD_SIZE.name, environment.SLURM_CPUS_PER_TASK.name, environment.LOGS.name}
        clean = {name: value for name, value in os.environ.items() if name not in names}
        command = [*bound, sys.executable, "-c", code]
        return int(subprocess.run(command, env=clean | variables, stdout=subprocess.PIPE, check=True).stdout)

    cores = processes.cores()
    assert count() == cores
    assert count("taskset", "--cpu-list", "0") == 1
    assert count(LOCAL_WORLD_SIZE=str(cores)) == 1
    assert count(LOCAL_WORLD_SIZE=str(10 * cores)) == 1
    assert count(SLURM_CPUS_PER_TASK="1") == cores  # of an interactive job: its tasks are not machines
    assert count(SLURM_CPUS_PER_TASK="1", LIFTDIST_LOGS=str(tmp_path)) == 1
