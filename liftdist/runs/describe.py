"""``config.yaml``, ``command.txt`` and ``environment.json`` in a run directory."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from liftdist import __version__, environment, files
from liftdist.distributed.mesh import Mesh
from liftdist.redaction import redact

SHOWN_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "peft")
SHOWN_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    environment.SLURM_JOB_ID.name,
    "SLURM_NNODES",
)


def describe_run(run_dir: Path, text: str, mesh: Mesh, commits: Mapping[str, str]) -> None:
    """Write the config, the command and the environment of a run, without secrets.

    Args:
        commits: ``NAME@COMMIT`` of what is from the hub, by setting.
    """
    files.write(run_dir / "config.yaml", text)
    with files.open_to_append(run_dir / "command.txt") as file:  # one line per attempt
        file.write(_command() + "\n")
    facts = {
        "liftdist": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in SHOWN_PACKAGES if importlib.util.find_spec(name)},
        "git": _git_state(),
        "hub": dict(commits),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(mesh.device)
        if mesh.device.type == "cuda"
        else platform.processor() or "cpu",
        "mesh": {"dp_replicate": mesh.device_mesh.size(0), "dp_shard": mesh.device_mesh.size(1)},
        "variables": {k: redact(v) for k, v in sorted(os.environ.items()) if k.startswith(SHOWN_ENVIRONMENT)},
    }
    files.write(run_dir / "environment.json", json.dumps(facts, indent=2) + "\n")


def _command() -> str:
    """The ``liftdist`` command as typed, or this rank's command line if it was started without ``liftdist``."""
    return shlex.join(map(redact, environment.COMMAND.get(sys.orig_argv)))


def _git_state() -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").exists():
        return None  # an installed package: a repository around it is not liftdist's
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
