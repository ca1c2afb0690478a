"""Whole runs as a user starts them: the command, real torchrun ranks, the run directory, and what goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import ranks
import torch
from commands import ROOT, run_command, user_error, write_config
from transformers import AutoModelForCausalLM

from liftdist import config as configs
from liftdist.console import Console
from liftdist.models import weights
from liftdist.runs.context import RunContext
from liftdist.training import setup


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished run on two ranks, with a secret in the environment."""
    folder = tmp_path_factory.mktemp("finished")
    records = builders.write_records(folder / "records.jsonl")
    config = write_config(folder, tiny_model, records)
    secrets = {"MY_API_KEY": "sesame-open-1", "WANDB_THING": "*.[sesame-open-2]_proj", "RECORDS": str(records)}
    run = run_command(
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
    first = steps[0]  # the step by the clock of rank 0, the phase by that of the slowest rank
    assert first["time/step"] > 0.5 * first["time/forward_backward"] > 0


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


def test_what_can_be_checked_before_ranks_start(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
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
        run = run_command("train", config, override, "--nproc", 2)
        assert problem in user_error(run)
        assert len(run.stdout.splitlines()) == 1
    assert user_error(run_command("train", tmp_path / "none.yaml")).endswith("none.yaml: No such file or directory")
    assert run_command("train").returncode == 2
    assert run_command("train", config, "--prefetch").returncode == 2


def test_what_only_ranks_find_out(tiny_model, tmp_path):
    """Errors past the first records end all ranks with one line, too: through the command and through bare torchrun."""
    records = builders.write_records(tmp_path / "records.jsonl")
    config = write_config(tmp_path, tiny_model, records)
    good = records.read_text().splitlines()
    (tmp_path / "late.jsonl").write_text("\n".join([*(good * 30), '{"prompt": 1}', ""]))
    run = run_command("train", config, "--nproc", 2, f"data.path={tmp_path}/late.jsonl")
    assert "late.jsonl:1201: 'prompt' must be text, got int" in user_error(run)
    asked, answer = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    chats = [{"messages": [asked, answer]}] * 899 + [{"messages": [{"role": "system", "content": "S"}, asked, answer]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    template = "{{ raise_exception('No system') if messages[0].role == 'system' }}{% for m in messages %}<|im_start|>{{ m.role }}"
    template += (
        "\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    run = run_command(
        "train", config, "--nproc", 2, f"data.path={tmp_path}/chats.jsonl", f"data.chat_template={template}"
    )
    assert "chats.jsonl:900: the chat template refuses this conversation: No system; change" in user_error(run)
    small = builders.llama(tmp_path / "small", ROOT / ".cache" / "quickstart" / "SmolLM2-135M-Instruct")
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(settings | {"vocab_size": 1000}))
    bare = ["--standalone", "--nproc-per-node", 2, "-m", "liftdist.train", config]
    run = run_command(*bare, f"model.path={small}", module="torch.distributed.run")
    assert run.returncode == 1
    said = [line for line in run.stdout.splitlines() if line.startswith("liftdist:")]
    assert len(said) == 1
    assert re.search(
        r"records.jsonl:1: token id \d+ is outside the model's 1000 embeddings; use the model's own", said[0]
    )
    assert run.stdout.count("Traceback (most recent call last)") <= 1  # torchrun's own, not one of every rank
    run = run_command(*bare, "train.stpes=1", module="torch.distributed.run")
    assert run.stdout.count("unknown key 'train.stpes'") == 1


def test_a_signal_to_the_command_reaches_all_ranks(tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    arguments = [sys.executable, "-m", "liftdist", "train", config, "--nproc", "2", "train.steps=100000"]
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
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    prefetch = run_command("select", config, "--prefetch")
    assert prefetch.returncode == 0, prefetch.stdout
    assert f"tensors in {tiny_model}" in prefetch.stdout
    run = run_command("select", config, "--nproc", 2)
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
    from liftdist.engine.criteria.low_rank import LowRank

    LowRank.scores = None
    _, _, method = setup.model_and_method(
        RunContext(config, mesh, Console(False)), folder, weights.digest(folder, Path(config.cache_dir))
    )
    return method.principal.values.numel()
