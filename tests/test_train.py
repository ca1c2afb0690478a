"""Whole runs as a user starts them: the command, real torchrun ranks, the run directory, and what goes wrong."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import builders
import pytest
import ranks
import torch
from test_data import write_records
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist import prepare, train, trainer, weights
from liftdist.config import UserError
from liftdist.mesh import Stopped
from liftdist.metrics import Console, Recorder

ROOT = Path(__file__).resolve().parent.parent


def write_config(folder, model, records, **extra):
    text = f"""\
run_dir: {folder}/run
cache_dir: {folder}/cache
model: {{path: {model}, dtype: float32}}
data: {{path: {records}, eval_path: {records}, max_length: 64}}
selection: {{density: 0.05, filter_rank: 4, refresh_interval: 3}}
optimizer: {{lr: 0.005}}
train: {{steps: 5, batch_size: 6, micro_batch_size: 2, eval_interval: 2}}
"""
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def command(*arguments, environment=None, module="liftdist.cli"):
    """Run a liftdist command in a process of its own; returns it finished, with its output as one text."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
    )


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished run on two ranks, with a secret in the environment."""
    folder = tmp_path_factory.mktemp("finished")
    records = write_records(folder / "records.jsonl")
    config = write_config(folder, tiny_model, records)
    secrets = {"MY_API_KEY": "sesame-open-1", "WANDB_THING": "sesame-open-2", "RECORDS": str(records)}
    run = command(
        "train", config, "--nproc", 2, "train.seed=1", "data.eval_path=${oc.env:RECORDS}",
        "selection.modules=['*', '${oc.env:WANDB_THING}']", "model.attn_implementation=sdpa", environment=secrets,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    return folder, run.stdout


def test_a_run_leaves_everything_behind(finished):
    folder, output = finished
    run = folder / "run"
    assert {p.name for p in run.iterdir()} == {
        "attempts", "checkpoints", "config.yaml", "command.txt", "environment.json", "metrics.jsonl", "tensorboard", "export",
    }  # fmt: skip
    assert "seed: 1" in (run / "config.yaml").read_text()
    typed = (run / "command.txt").read_text()
    assert typed.startswith(f"liftdist train {folder}/config.yaml --nproc 2 train.seed=1")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["mesh"] == {"dp_replicate": 1, "dp_shard": 2}
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert "training 5/5" in output  # plain lines where there is no terminal
    assert "\r" not in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 5]
    assert steps[-1]["train/sequences"] == 30
    assert 0.5 < steps[2]["selection/survived"] <= 1
    for key in (
        "train/lr", "train/grad_norm", "throughput/tokens_per_second", "throughput/tokens_per_second_per_rank",
        "throughput/data_wait_share", "time/step", "time/forward_backward", "time/exchange", "time/update", "time/refresh",
        "memory_gib/host_resident/rank0", "memory_gib/host_peak/rank1",
    ):  # fmt: skip
        assert steps[-1][key] >= 0, key
    assert steps[0]["time/step"] > steps[0]["time/forward_backward"] > 0


def test_tensorboard_reads_the_run(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["train/loss"] for line in lines if "train/loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert len(events.Scalars("eval/loss")) == 4
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "batch_size: 6" in texts["config/text_summary"]
    assert "principal weights" in texts["parameters/text_summary"]


def test_the_exported_model_is_the_trained_one(finished, tiny_model):
    folder, _ = finished
    exported = AutoModelForCausalLM.from_pretrained(folder / "run" / "export")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    changed = {n: (p != base.get_parameter(n)).float().mean().item() for n, p in exported.named_parameters()}
    for name, share in changed.items():
        trained = "_proj" in name
        assert (0.03 < share < 0.08) if trained else share == 0, (name, share)


def test_no_secret_in_any_file_or_output(finished):
    folder, output = finished
    for path in [p for p in (folder / "run").rglob("*") if p.is_file()]:
        assert b"sesame-open" not in path.read_bytes(), path
    assert "sesame-open" not in output


def user_error(run):
    """The one line that a finished command printed for its user; fails if there is more or less."""
    assert run.returncode == 2, run.stdout
    assert "Traceback" not in run.stdout, run.stdout
    said = [line for line in run.stdout.splitlines() if line.startswith("liftdist:")]
    assert len(said) == 1, run.stdout
    return said[0]


def test_what_can_be_checked_before_ranks_start(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, tiny_model, records)
    (tmp_path / "bad.jsonl").write_text(records.read_text() + '{"prompt": "x"\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for override, problem in (
        ("train.stpes=3", "did you mean 'train.steps'?"),
        (f"data.path={tmp_path}/none.jsonl", "none.jsonl: no such file"),
        (f"data.path={tmp_path}/bad.jsonl", "bad.jsonl:41: not JSON"),
        (f"run_dir={tmp_path}/used", "exists and holds no run"),
        ("run_dir=/proc/run", "run_dir /proc/run: cannot be written"),
        ("cache_dir=/proc/cache", "cache_dir /proc/cache: cannot be written"),
        ("mesh.dp_replicate=3", "2 ranks cannot be 3 replicas"),
        (f"model.path={tmp_path}/none", "none: no such folder"),
        (f"model.path={tmp_path}/used", "holds no model.safetensors"),
    ):
        run = command("train", config, override, "--nproc", 2)
        assert problem in user_error(run)
        assert len(run.stdout.splitlines()) == 1
    assert user_error(command("train", tmp_path / "none.yaml")).endswith("none.yaml: No such file or directory")
    assert command("train").returncode == 2
    assert command("train", config, "--prefetch").returncode == 2


def test_what_only_ranks_find_out(tiny_model, tmp_path):
    """Errors past the first records end all ranks with one line, too: through the command and through bare torchrun."""
    records = write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, tiny_model, records)
    good = records.read_text().splitlines()
    (tmp_path / "late.jsonl").write_text("\n".join([*(good * 30), '{"prompt": 1}', ""]))
    run = command("train", config, "--nproc", 2, f"data.path={tmp_path}/late.jsonl")
    assert "late.jsonl:1201: 'prompt' must be text, got int" in user_error(run)
    small = builders.llama(tmp_path / "small", ROOT / ".cache" / "quickstart" / "SmolLM2-135M-Instruct")
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(settings | {"vocab_size": 1000}))
    bare = ["--standalone", "--nproc-per-node", 2, "-m", "liftdist.train", config]
    run = command(*bare, f"model.path={small}", module="torch.distributed.run")
    assert run.returncode == 1
    said = [line for line in run.stdout.splitlines() if line.startswith("liftdist:")]
    assert len(said) == 1
    assert "the tokenizer has 49152 tokens, the model 1000 embeddings" in said[0]
    assert run.stdout.count("Traceback (most recent call last)") <= 1  # torchrun's own, not one of every rank
    run = command(*bare, "train.stpes=1", module="torch.distributed.run")
    assert run.stdout.count("unknown key 'train.stpes'") == 1


def test_a_signal_to_the_command_reaches_all_ranks(tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
    arguments = [sys.executable, "-m", "liftdist.cli", "train", config, "--nproc", "2", "train.steps=100000"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "training 2/" in line:
            break
    ranks_of_it = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(config).encode() in p.read_bytes()]
    assert len(ranks_of_it) >= 3  # the launcher, torchrun and its ranks
    process.terminate()
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert rest.count("liftdist: stopped (SIGTERM); the same command continues") == 1
    assert "Traceback" not in rest
    assert not [p for p in ranks_of_it if p.exists()]


def test_select_keeps_what_train_then_uses(tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
    prefetch = command("select", config, "--prefetch")
    assert prefetch.returncode == 0, prefetch.stdout
    assert f"tensors in {tiny_model}" in prefetch.stdout
    run = command("select", config, "--nproc", 2)
    assert run.returncode == 0, run.stdout
    kept = Path(run.stdout.split("kept in ")[1].split()[0])
    assert (kept / "selection.json").exists()
    assert not (tmp_path / "run").exists()

    loaded, _ = configs.load(config)
    stamp = (kept / "selection.json").stat().st_mtime_ns
    assert ranks.run(3, counts, loaded, tiny_model)[0] > 0
    assert (kept / "selection.json").stat().st_mtime_ns == stamp


def counts(mesh, config, folder):
    """Principal weights on this rank when the selection comes from the cache: selecting itself must not run."""
    from liftdist import lowrank

    lowrank.select = None
    _, principal = prepare.principal(
        config, folder, weights.digest(folder, Path(config.cache_dir)), mesh, Console(False)
    )
    return principal.values.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Runs that continue.


def test_a_run_goes_on_where_it_was_stopped(tiny_model, tmp_path):
    """Through the command, on another number of ranks; a fresh one is elsewhere."""
    config = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))

    def ask_to_stop():
        while not list((tmp_path / "run").glob("attempts/*")):
            time.sleep(0.05)
        (tmp_path / "run" / "stop-requested").touch()  # while it is loading

    threading.Thread(target=ask_to_stop, daemon=True).start()
    first = command("train", config, "--nproc", 2)
    assert first.returncode == 75, first.stdout
    assert "liftdist: stopped (stop-requested); the same command continues" in first.stdout
    assert json.loads((tmp_path / "run" / "stopped").read_text()) == {
        "outcome": "stopped", "reason": "stop-requested", "attempt": 1,
    }  # fmt: skip
    assert command("train", config, "--nproc", 1).returncode == 0
    assert not (tmp_path / "run" / "stopped").exists()
    assert len((tmp_path / "run" / "command.txt").read_text().splitlines()) == 1  # of those that came to train
    fresh = command("train", config, "--nproc", 1, "--fresh", "model.path=none")
    assert f"run_dir {tmp_path}/run is taken; starting in {tmp_path}/run-2" in fresh.stdout
    assert (tmp_path / "run-2" / "attempts").is_dir()
    changed = command("train", config, "--nproc", 1, "train.steps=9")  # before ranks are started
    assert "train.steps: 5 -> 9; --allow-changes goes on with them" in user_error(changed)
    assert len(changed.stdout.splitlines()) == 1
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000005"]


def change_settings(mesh, first, others):
    """How a run with ``first`` settings ends, and how it goes on with each of ``others``."""
    ends = []
    for config, text, allowed in [first, *others]:
        train.STOP.__init__()
        try:
            train.train(config, mesh, text, set(allowed))
            ends.append(metrics_of(config)[-1]["step"])
        except UserError as error:
            ends.append(str(error))
    return ends


def metrics_of(config):
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_changed_settings_are_named_and_need_to_be_allowed(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    other_model = builders.llama(tmp_path / "other", tiny_model, initializer_range=0.07)

    def settings(steps, allowed=(), **changes):
        file = write_config(tmp_path, tiny_model, records)
        overrides = [f"{key}={value}" for key, value in changes.items()]
        overrides += [f"train.steps={steps}", "train.export=false", "checkpoint.keep=9"]
        return *configs.load(file, [override.replace("__", ".") for override in overrides]), allowed

    course, state = {configs.COURSE}, {configs.COURSE, configs.STATE}
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
    assert "train.steps: 2 -> 4; --allow-changes goes on with them" in refused[0]
    assert "selection.density: 0.05 -> 0.06; --allow-state-changes goes on with them" in refused[1]
    assert "self_attn.k_proj.weight, which is not trained now; its weights would be lost" in refused[2]
    assert "model.path: other weights (" in refused[3]
    run_dir = tmp_path / "run" / "checkpoints"
    densities = []
    for step in (4, 6):
        parameters = json.loads((run_dir / f"step-{step:08d}" / "manifest.json").read_text())["parameters"].values()
        densities.append([p["principal"] / (p["shape"][0] * p["shape"][1]) for p in parameters])
    assert densities[0] == pytest.approx([0.05] * 14, abs=1e-3)
    assert densities[1] == pytest.approx([0.06] * 14, abs=1e-3)  # selected anew

    records.write_text(records.read_text() + '{"prompt": "one more", "completion": "yes"}\n')
    ((end,), _) = ranks.run(2, change_settings, (*settings(6, optimizer__lr=1e-4, selection__density=0.06)[:2], ()), [])
    assert "data.path: other contents of the same name" in end


def test_another_batch_size_sees_the_rest_of_the_data_and_no_more(tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
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
    original = trainer.Trainer.run_step

    def run_step(self):
        figures = original(self)
        if self.step == step:
            train.STOP.reason = "enough"
        return figures

    trainer.Trainer.run_step = run_step
    with contextlib.suppress(Stopped):
        train.train(config, mesh, text, {configs.COURSE})


def test_a_value_from_the_environment_that_changed_is_noticed(tiny_model, tmp_path, monkeypatch):
    file = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
    overrides = ["optimizer.lr=${oc.env:RATE}", "train.export=false", "train.steps=2"]
    monkeypatch.setenv("RATE", "0.001")
    first = *configs.load(file, overrides), ()
    monkeypatch.setenv("RATE", "0.5")
    second = *configs.load(file, overrides), ()
    assert first[1] == second[1]
    (ends,) = ranks.run(1, change_settings, first, [first, second])
    assert ends[:2] == [2, 2]
    assert "optimizer.lr: another value from the environment" in ends[2]


def in_another_environment(mesh, file, overrides):
    """How a run ends when rank 1 has another value in its environment."""
    os.environ["RATE"] = "0.5" if mesh.rank else "0.001"
    config, text = configs.load(file, overrides)
    try:
        train.train(config, mesh, text, set())
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_start_from_something_else_are_named(tiny_model, tmp_path):
    file = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
    for end in ranks.run(2, in_another_environment, file, ["optimizer.lr=${oc.env:RATE}", "train.steps=1"]):
        assert re.fullmatch(r"rank 1 on .* has other environment than rank 0", end)


def test_curves_go_on_without_a_step_twice(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = write_config(tmp_path, tiny_model, write_records(tmp_path / "records.jsonl"))
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_curves_and_no_more(small_disk):
    said = []
    recorder = Recorder(small_disk, True, None, said.append)
    for step in range(1, 4):
        recorder.scalars(step, {"train/loss": 1.0})
    filler = builders.fill(small_disk)
    for step in range(4, 400):
        recorder.scalars(step, {"train/loss": 1.0, "a/" + "long" * 20: 2.0})
    filler.unlink()
    for step in range(400, 403):
        recorder.scalars(step, {"train/loss": 1.0})
    recorder.close()
    assert len(said) == 1
    assert "metrics cannot be recorded, training goes on: [Errno 28]" in said[0]
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[-3:]] == [400, 401, 402]


def break_after(mesh, config, text, step):
    """A run that a bug ends after ``step``."""
    original = trainer.Trainer.run_step

    def run_step(self):
        if self.step == step:
            raise RuntimeError("a bug")
        return original(self)

    trainer.Trainer.run_step = run_step
    try:
        train.train(config, mesh, text, set())
    except RuntimeError:
        return
    raise AssertionError


# ---------------------------------------------------------------------------------------------------------------------
# Settings, on one rank.


def losses_of(mesh, config):
    made = builders.trainer(mesh, config)
    figures = [made.run_step() for _ in range(made.steps)]
    return dict(
        losses=[f["train/loss"] for f in figures],
        lrs=[f["train/lr"] for f in figures],
        norms=[f["train/grad_norm"] for f in figures],
        values=made.principal.values.detach().clone(),
        sequences=made.consumed,
    )


@pytest.fixture
def run(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")

    def run(world_size=1, **sections):
        sections.setdefault("train", {})
        sections["train"] = dict(steps=6) | sections["train"]
        return ranks.run(world_size, losses_of, builders.config(tiny_model, records, tmp_path, **sections))[0]

    return run


def test_schedules(run):
    settings = dict(lr=1.0e-4, warmup_ratio=0.3)
    linear = run(optimizer=settings)["lrs"]
    assert linear == pytest.approx([0, 5e-5, 1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert run(optimizer=settings | dict(schedule="constant"))["lrs"] == pytest.approx([0, 5e-5] + [1e-4] * 4)
    cosine = run(optimizer=settings | dict(schedule="cosine"))["lrs"]
    assert cosine == pytest.approx([0, 5e-5, 1e-4, 8.5355e-5, 5e-5, 1.46447e-5], rel=1e-4)


def test_what_must_not_change_the_result(run):
    plain = run()
    for same in (
        run(model=dict(activation_checkpointing=True)),
        run(train=dict(micro_batch_size=8)),
        run(train=dict(deterministic=True)),
        run(selection=dict(method="exact")),
        run(optimizer=dict(max_grad_norm=1e9)),
    ):
        assert same["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    packed = run(data=dict(packing=True))
    assert packed["sequences"] == plain["sequences"] == 48  # the batch counts sequences, each of several samples here
    assert packed["losses"][0] == pytest.approx(plain["losses"][0], abs=0.2)
    assert run(optimizer=dict(max_grad_norm=1e-3))["norms"][0] == pytest.approx(plain["norms"][0])


def test_epochs_end_where_the_data_does(run):
    result = run(2, train=dict(steps=None, epochs=2, batch_size=7, micro_batch_size=2))
    assert len(result["losses"]) == 12  # ceil(2 * 40 / 7)
    assert result["sequences"] == 80


def test_reference_numerics_add_epsilon_to_the_uncorrected_denominator(run):
    settings = dict(eps=1e-2, schedule="constant", lr=1e-2)
    stock, reference = (
        run(train=dict(steps=1), optimizer=settings | dict(reference_numerics=r)) for r in (False, True)
    )
    assert not torch.equal(stock["values"], reference["values"])
    # after one step: m = .1 g, v = .05 g^2; ours: g / (|g| + eps), the authors': g / (|g| + eps / sqrt(.05))
    start = run(train=dict(steps=1), optimizer=dict(lr=1e-30))["values"]
    moved, moved_reference = (start - stock["values"]).abs() / 1e-2, (start - reference["values"]).abs() / 1e-2
    gradient = 1e-2 * moved / (1 - moved)
    assert torch.allclose(moved_reference, gradient / (gradient + 1e-2 / 0.05**0.5), atol=2e-4)


def test_samples_beyond_the_context_of_the_model_are_refused(tiny_model, tmp_path):
    records = tmp_path / "long.jsonl"
    records.write_text(json.dumps({"prompt": "a", "completion": " b" * 600}) + "\n")
    config = builders.config(tiny_model, records, tmp_path, data=dict(max_length=1000))
    with pytest.raises(UserError, match=r"data.max_length=1000: .* a sample of 602 tokens, the model's context is 512"):
        prepare.inputs(config, Console(False))
    config.data.max_length = 512
    assert prepare.inputs(config, Console(False)).samples.truncated == 1


def diverged(mesh, config):
    try:
        losses_of(mesh, config)
    except UserError as error:
        return str(error)
    return ""


def test_a_run_that_diverges_says_so_on_every_rank(tiny_model, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    config = builders.config(
        tiny_model,
        records,
        tmp_path,
        optimizer=dict(lr=1e38, schedule="constant"),
        train=dict(steps=6, max_skipped_steps=0),
    )
    assert all("steps in a row went wrong" in text for text in ranks.run(2, diverged, config))


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(run):
    assert run(model=dict(compile=True))["losses"] == pytest.approx(run()["losses"], rel=1e-5)
