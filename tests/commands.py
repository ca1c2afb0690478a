"""Commands as a user gives them, and files of settings for them."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import yaml

from liftdist import cli

ROOT = Path(__file__).resolve().parent.parent
INJECT = ROOT / "tests" / "inject"  # on PYTHONPATH, it makes ranks slow or lets them fail


def write_config(folder: Path, model: Path, records: Path, **sections) -> Path:
    """A config of five steps, evaluated on their own records; ``sections`` holds dicts of settings by section."""
    settings = dict(
        run_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        model=dict(path=str(model), dtype="float32"),
        data=dict(path=str(records), eval_path=str(records), max_length=64),
        selection=dict(density=0.05, filter_rank=4, refresh_interval=3),
        optimizer=dict(lr=0.005),
        train=dict(steps=5, batch_size=6, micro_batch_size=2, eval_interval=2),
    )
    for section, values in sections.items():
        settings[section] = settings.get(section, {}) | values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def write_job_config(
    folder: Path, model: Path, records: Path, *, save_every: int = 5, slurm: dict | None = None, **train
) -> Path:
    """A config of a longer run that keeps its checkpoints, and neither evaluates nor exports: a job to be disturbed."""
    return write_config(
        folder, model, records,
        data=dict(eval_path=None),
        selection=dict(refresh_interval=7),
        train=dict(steps=30, eval_interval=0, export=False) | train,
        checkpoint=dict(interval=save_every, keep=50),
        slurm=slurm or {},
    )  # fmt: skip


def run_command(
    *arguments, environment: dict | None = None, module: str = "liftdist", timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; returns it finished, with its output and its errors as one text."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
    )


def user_error(run: subprocess.CompletedProcess[str]) -> str:
    """The one line that a finished command printed for its user; fails if there is more or less."""
    assert run.returncode == 2, run.stdout
    assert "Traceback" not in run.stdout, run.stdout
    said = [line for line in run.stdout.splitlines() if line.startswith("liftdist:")]
    assert len(said) == 1, run.stdout
    return said[0]


def call(*words) -> tuple[int, str]:
    """Run a command in this process; its exit code and what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, said.getvalue()


def liftdist(*words, code: int = 0) -> str:
    """Run a command that is to end with ``code`` in this process; what it printed."""
    ended, said = call(*words)
    assert ended == code, said
    return said
