"""Runs where variables and files lie about that mean something to torchrun, to its ranks or to Python."""

import json
import os
import pty
import subprocess
import sys

import builders
import pytest
from commands import ROOT, write_config

from liftdist import environment
from liftdist.__main__ import __file__ as command

#: As Kubeflow, other launchers, NVIDIA's images and shells inside of jobs leave them; each alone would end or change a run.
LEFT_BEHIND = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "7",
    "PET_RDZV_BACKEND": "etcd",
    "PET_RDZV_ENDPOINT": "nowhere.invalid:1",
    "PET_MAX_RESTARTS": "-3",
    "PET_NO_PYTHON": "1",
    "PET_RUN_PATH": "1",
    "PET_LOG_DIR": "/dev/null/logs",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "203.0.113.9",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "another",
    "TORCHELASTIC_ERROR_FILE": "/dev/null/error",
    "TORCHELASTIC_RESTART_COUNT": "9",
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}",
    "PYTHON_EXEC": "/bin/false",
    "LOGLEVEL": "debug",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
}
INTERNAL = {  # of a job whose shell this is
    "LIFTDIST_LOGS": "/dev/null/logs",
    "LIFTDIST_STATUS_FILE": "/dev/null/status",
    "LIFTDIST_STARTED": "1",
    "LIFTDIST_AGENT": "1",
    "LIFTDIST_LEAD": "x",
    "LIFTDIST_COMMAND": "no JSON",
}
UNUSED = {
    "SLURM_JOB_ID": "12",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
}


def test_a_run_does_what_was_typed(tiny_model, tmp_path):
    """In a folder with modules of the names of libraries, and another checkout of liftdist."""
    config = write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))
    here = tmp_path / "here"
    for name in ("random.py", "tokenize.py", "datasets/__init__.py", "liftdist/__init__.py", "torch/__init__.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"raise SystemExit('{name} of the current folder was imported')\n")
    run_dir = "cash $$ and $local_rank, ü"
    words = ["train", str(config), "train.steps=2", "train.eval_interval=0", f"run_dir={run_dir}"]
    done = subprocess.run(
        [sys.executable, "-P", command, *words],
        cwd=here, capture_output=True, text=True, timeout=100,
        env={**os.environ, **LEFT_BEHIND, **INTERNAL, **UNUSED, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
             "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (named,) = [line for line in done.stderr.splitlines() if "not used, though in the environment" in line]
    assert all(f"{name}={value}" in named for name, value in LEFT_BEHIND.items())
    assert "2 steps of 6 sequences on 1 ranks" in done.stderr
    assert f"liftdist 0.1.0 of {ROOT / 'liftdist'}" in done.stderr
    (made,) = (path for path in here.iterdir() if path.name.startswith("cash"))
    assert made.name == run_dir
    assert (made / "export" / "model.safetensors").is_file()
    assert json.loads((made / "environment.json").read_text())["mesh"] == {"dp_replicate": 1, "dp_shard": 1}
    assert str(words[-1]) in (made / "command.txt").read_text()


def test_names_that_mean_something_to_others_are_known():
    assert environment.foreign(LEFT_BEHIND | INTERNAL | UNUSED | {"PET": "", "RANKS": "", "PATH": "/"}) == sorted(
        LEFT_BEHIND
    )
    assert set(INTERNAL) <= set(environment.internal())
    assert environment.PYTHON.name not in environment.internal()


@pytest.mark.parametrize(("tasks", "nodes"), [(1, 1), (4, 1), (2, 2)])
def test_a_shell_inside_a_slurm_step_is_no_node_of_a_run(tasks, nodes, tmp_path):
    """``srun --pty bash``, and what ``salloc`` starts: a step whose number of tasks says nothing about the run."""
    code = (
        "import argparse; from liftdist import schema; from liftdist.cluster import nodes\n"
        "p = argparse.ArgumentParser(); nodes.arguments(p)\n"
        "where = nodes.place(schema.Config(run_dir='run'), p.parse_args([]))\n"
        "open('place', 'w').write(f'{where.nnodes} {where.in_job}')"
    )
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": str(nodes)}
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ |= step | {"PYTHONPATH": str(ROOT)}
        os.execv(sys.executable, [sys.executable, "-c", code])
    said = b""
    try:
        while part := os.read(master, 4096):
            said += part
    except OSError:  # how Linux reports the end of a terminal
        pass
    os.waitpid(pid, 0)
    assert (tmp_path / "place").read_text() == "1 False", said
    assert (b"this job has 2 nodes, only this one is used" in said) == (nodes == 2)
