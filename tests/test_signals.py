"""Runs that are asked to stop at any moment, or whose numbers go wrong: on real ranks, with real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
import ranks
import torch
from test_data import write_records

from liftdist import config as configs
from liftdist.distributed.collectives import together
from liftdist.engine.criteria import low_rank
from liftdist.errors import Stopped, UserError
from liftdist.models import weights
from liftdist.runs import checkpoint, claims, saver
from liftdist.runs.stop import StopRequests
from liftdist.training import loss as training_loss
from liftdist.training.run import train

PHASES = ("forward", "accumulation", "evaluation", "refresh", "save", "selection", "loading")


def run_once(mesh, config, text="train: {}", allowed=(), stop=None):
    """One attempt at a run, and how it ended."""
    stop = stop or StopRequests()
    stop.catch(config.train.stop_signals)
    try:
        train(config, mesh, text, set(allowed), stop)
        return "finished"
    except (Stopped, UserError) as end:
        return f"{type(end).__name__}: {end}"


class Strike:
    """Rank 1 sends itself a signal, twice, in the middle of a phase."""

    def __init__(self, mesh, phase, number):
        self.mesh, self.phase, self.number = mesh, phase, number
        self.forwards = self.evaluations = 0
        self.struck_in_step = None

    def hit(self, phase):
        if phase == self.phase and self.struck_in_step is None:
            self.struck_in_step = (self.forwards + 1) // 2  # two micro-batches a step
            if self.mesh.rank == 1:
                os.kill(os.getpid(), self.number)
                os.kill(os.getpid(), self.number)

    def __enter__(self):
        self.originals = training_loss.token_losses, low_rank.select, saver._write_file, weights.ModelFolder.read
        losses, select, write, read = self.originals

        def token_losses(model, batch, *rest):
            if model.training:
                self.forwards += 1
                if self.forwards in (3, 4):
                    self.hit("forward" if self.forwards == 3 else "accumulation")
            else:
                self.evaluations += 1
                if self.evaluations == 15:  # inside the second of ten micro-batches
                    self.hit("evaluation")
            return losses(model, batch, *rest)

        def score(*arguments):
            self.hit("refresh" if self.forwards else "selection")
            return select(*arguments)

        def write_file(path, state):
            self.hit("save")
            time.sleep(0.3)
            return write(path, state)

        def read_rows(*arguments):
            self.hit("loading")
            return read(*arguments)

        training_loss.token_losses, low_rank.select, saver._write_file = token_losses, score, write_file
        weights.ModelFolder.read = read_rows
        return self

    def __exit__(self, *_):
        training_loss.token_losses, low_rank.select, saver._write_file, weights.ModelFolder.read = self.originals


def files_of(run_dir):
    """Hashes of what the newest checkpoint holds, and its step."""
    steps = checkpoint.accepted(run_dir, claims.attempts(run_dir))
    if not steps:
        return 0, {}
    manifest = checkpoint.open_step(run_dir / "checkpoints" / max(steps)).manifest
    return manifest["step"], {name: entry["sha256"] for name, entry in manifest["files"].items()}


def stopped_in_every_phase(mesh, config, folder):
    config.run_dir = str(folder / "undisturbed")
    assert run_once(mesh, config) == "finished"
    step, expected = files_of(folder / "undisturbed")
    assert step == config.train.steps
    outcomes = {}
    for number, phase in enumerate(PHASES):
        config.run_dir = str(folder / phase)
        config.cache_dir = str(folder / ("other-cache" if phase == "selection" else "cache"))
        with Strike(mesh, phase, (signal.SIGTERM, signal.SIGUSR1)[number % 2]) as strike:
            end = run_once(mesh, config)
        torch.distributed.barrier()
        stopped_at, _ = files_of(folder / phase)
        reason = builders.last_end(folder / phase)["reason"]
        again = run_once(mesh, config)
        same = files_of(folder / phase) == (step, expected)
        outcomes[phase] = (end, strike.struck_in_step, stopped_at, reason, again, same)
    return outcomes


def test_a_run_stops_in_every_phase_and_continues_to_the_bit(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    config = builders.config(
        tiny_model, records, tmp_path,
        data=dict(eval_path=str(records)),
        selection=dict(refresh_interval=3),
        train=dict(steps=7, batch_size=6, eval_interval=4, export=False),
        checkpoint=dict(interval=2, keep=9),
    )  # fmt: skip
    for outcomes in ranks.run(2, stopped_in_every_phase, config, tmp_path):
        for phase, (end, struck, stopped, reason, again, same) in outcomes.items():
            assert end == f"Stopped: {reason}", phase
            assert reason in ("SIGTERM", "SIGUSR1")
            assert struck is not None, phase
            assert 0 <= stopped - max(struck - 1, 0) <= 2, (phase, struck, stopped)
            assert again == "finished"
            assert same, phase


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong.


def with_bad_numbers(mesh, config, kind, steps):
    """One attempt in which rank 1 computes a loss, or a gradient, that is no number in some steps."""
    original, calls = training_loss.token_losses, 0

    def losses(model, batch, *rest):
        nonlocal calls
        loss = original(model, batch, *rest)
        calls += 1
        if mesh.rank == 1 and (calls + 1) // 2 in steps:
            if kind == "loss":
                loss = loss * torch.nan
            else:
                loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    training_loss.token_losses = losses
    try:
        return run_once(mesh, config)
    finally:
        training_loss.token_losses = original


def numbers_gone_wrong(mesh, config, folder):
    outcomes = {}
    for kind, steps in (("loss", (3,)), ("gradient", (3,)), ("every", tuple(range(3, 9)))):
        config.run_dir = str(folder / kind)
        end = with_bad_numbers(mesh, config, "loss" if kind == "every" else kind, steps)
        outcomes[kind] = (end, *files_of(folder / kind))
    return outcomes


@pytest.fixture
def diverging(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    return builders.config(
        tiny_model, records, tmp_path,
        train=dict(steps=8, batch_size=6, export=False, max_skipped_steps=3),
        optimizer=dict(max_grad_norm=1.0),
        checkpoint=dict(interval=2, keep=9),
    )  # fmt: skip


def test_a_step_that_goes_wrong_on_one_rank_changes_nothing_on_any(diverging, tmp_path):
    (outcomes, other) = ranks.run(2, numbers_gone_wrong, diverging, tmp_path)
    assert outcomes == other
    (end, step, files), (gradient_end, _, gradient_files), (stopped, stopped_at, _) = outcomes.values()
    assert end == gradient_end == "finished"
    assert step == 8
    assert files == gradient_files  # both have left out step 3 and nothing else
    lines = [json.loads(line) for line in (tmp_path / "loss" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    assert [steps[step]["train/skipped_steps"] for step in range(1, 9)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert steps[3]["train/loss"] is None
    assert steps[8]["train/sequences"] == 48  # the samples of the skipped step are behind us
    assert stopped_at == 2  # the last before it went wrong
    assert "step 6: loss nan" in stopped
    assert "4 steps in a row went wrong (train.max_skipped_steps)" in stopped
    assert "gradient not finite in model.layers.0." in stopped
    assert f"samples {tmp_path}/records.jsonl:" in stopped


def with_large_gradients(mesh, config):
    """Gradients whose squares are beyond float32, in step 2: finite, and yet poison for Adam's second moment."""
    original, calls = training_loss.token_losses, 0

    def losses(model, batch, *rest):
        nonlocal calls
        calls += 1
        loss = original(model, batch, *rest)
        if (calls + 1) // 2 == 2:
            loss.register_hook(lambda gradient: gradient * 1e25)
        return loss

    training_loss.token_losses = losses
    config.optimizer.max_grad_norm = None
    return run_once(mesh, config)


def test_a_gradient_whose_square_overflows_is_no_step(diverging, tmp_path):
    assert ranks.run(2, with_large_gradients, diverging) == ["finished"] * 2
    assert files_of(tmp_path / "run")[0] == 8
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines if "train/loss" in line] == [0] + [1] * 7


def together_differently(mesh):
    """Ranks that have different errors at once all raise of one kind."""
    kinds = {0: UserError("mine"), 1: Stopped("SIGTERM"), 2: None}
    seen = []
    for errors in (kinds, kinds | {2: ZeroDivisionError("a bug")}):
        try:
            with together():
                if errors[mesh.rank] is not None:
                    raise errors[mesh.rank]
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
    return seen


def test_ranks_with_different_errors_raise_of_one_kind():
    for rank, seen in enumerate(ranks.run(3, together_differently)):
        bug = "ZeroDivisionError: a bug" if rank == 2 else "PeerError: rank 2 failed: ZeroDivisionError: a bug"
        assert seen == ["UserError: mine", bug]


def test_a_gradient_that_is_not_finite_names_its_samples(diverging, tmp_path):
    diverging.train.max_skipped_steps = 0
    end, _ = ranks.run(2, with_bad_numbers, diverging, "gradient", (1,))
    assert end.startswith("UserError: step 1: loss ")
    assert "gradient norm nan" in end or "gradient norm inf" in end
    assert "and 2 more" in end  # all six samples of the batch: a finite loss does not tell which


# ---------------------------------------------------------------------------------------------------------------------
# Whole jobs under torchrun.


def write_config(folder, model, records, **train):
    settings = dict(steps=30, batch_size=6, micro_batch_size=2, export=False) | train
    path = folder / "config.yaml"
    path.write_text(
        json.dumps(
            dict(
                run_dir=str(folder / "run"),
                cache_dir=str(folder / "cache"),
                model=dict(path=str(model), dtype="float32"),
                data=dict(path=str(records), max_length=64),
                selection=dict(density=0.05, filter_rank=4, refresh_interval=7),
                optimizer=dict(lr=0.005),
                train=settings,
                checkpoint=dict(interval=5, keep=50),
            )
        )
    )
    return path


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


def read_until(process, text):
    """Read a job's output up to a line with ``text``."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError("".join(seen))


def ranks_of(config):
    """Processes of a job by rank."""
    found = {}
    for folder in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if b"liftdist.train" in words and str(config).encode() in words and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def seconds_until(condition, limit):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit
        time.sleep(0.02)
    return time.monotonic() - began


def test_a_killed_rank_a_second_job_and_a_restart(tiny_model, tmp_path):
    """A rank is killed mid-step: its peer goes, torchrun starts both again, and the end is that of an undisturbed run."""
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"), steps=400)
    job = torchrun(config, "--standalone", "--max-restarts", "2")
    read_until(job, "training 12/400")
    second = subprocess.run(
        [sys.executable, "-m", "liftdist.cli", "train", str(config), "--nproc", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 2
    assert "in use by process" in second.stderr
    first = ranks_of(config)
    os.kill(first[1], signal.SIGKILL)
    killed = time.monotonic()
    assert seconds_until(lambda: not is_alive(first[0]), 10) < 2
    said = read_until(job, "training ")
    assert "continuing after step" in said or "continuing after step" in read_until(job, "continuing after step")
    print(f"training again {time.monotonic() - killed:.1f} s after the kill")
    assert time.monotonic() - killed < 30
    (tmp_path / "run" / "stop-requested").touch()
    rest = job.communicate(timeout=60)[0]
    assert "stopped (stop-requested); the same command continues" in rest
    assert not (tmp_path / "run" / "stop-requested").exists()
    stopped_at, files = files_of(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "disturbed")
    (undisturbed,) = set(ranks.run(2, run_to, config, stopped_at))
    assert undisturbed == json.dumps(files)


def run_to(mesh, config, step):
    """The checkpoint of ``step`` in an undisturbed run."""
    loaded, text = configs.load(config)
    original, stop = saver.Checkpointer.save, StopRequests()

    def save(self, state, matrices, manifest):
        original(self, state, matrices, manifest)
        if manifest["step"] == step:
            stop.reason = "there"

    saver.Checkpointer.save = save
    loaded.checkpoint.interval = 1 if step % 5 else 5
    run_once(mesh, loaded, text, stop=stop)
    files = checkpoint.open_step(Path(loaded.run_dir) / "checkpoints" / f"step-{step:08d}").manifest["files"]
    return json.dumps({name: entry["sha256"] for name, entry in files.items()})


@pytest.mark.parametrize("through", ["torchrun", pytest.param("liftdist", marks=pytest.mark.slow)])
def test_no_rank_outlives_its_agent(through, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"), steps=100000)
    job = torchrun(config, "--standalone") if through == "torchrun" else command(config)
    read_until(job, "training 2/")
    pids = ranks_of(config)
    assert sorted(pids) == [0, 1]
    job.kill()
    assert seconds_until(lambda: not any(map(is_alive, pids.values())), 10) < 5
    job.communicate()


def command(config):
    """Start a job of two ranks by the command, in a session of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "liftdist.cli", "train", str(config), "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_signals_to_every_process_of_a_job_stop_it_once(tiny_model, tmp_path):
    """As schedulers send them: to the command, to torchrun and to the ranks, one after the other and again."""
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"), steps=100000)
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
    assert files_of(tmp_path / "run")[0] >= 2


def test_a_rank_that_hangs_is_reported_with_the_stacks_of_the_others(tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"), steps=100000, hang_timeout=3)
    job = torchrun(config, "--standalone")
    read_until(job, "training 2/")
    pids = ranks_of(config)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        said = read_until(job, "no progress for 3 s") + read_until(job, "ranks wait")
    finally:
        os.kill(pids[1], signal.SIGKILL)
    job.communicate(timeout=60)
    assert "1 of 2 ranks wait" in said
    assert "no sign of rank 1: stopped, or its machine is gone" in said
    stacks = (tmp_path / "run" / "hang-1" / "rank-00000.txt").read_text()
    assert "to_the_end" in stacks
    assert "Thread 0x" in stacks


def test_signals_that_are_not_to_stop_a_run_do_what_they_always_did():
    stop = StopRequests()
    before = {name: signal.getsignal(signal.Signals[name]) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")}
    try:
        stop.catch()
        stop.catch(["SIGUSR2"])
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(Stopped, match="SIGUSR2"):
            stop.check()
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)
