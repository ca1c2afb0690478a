"""What a run needs before its first step: inputs, a model with its principal weights, and a folder that explains itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from liftdist import __version__, files, preflight
from liftdist import config as configs
from liftdist.data import tokenised as data
from liftdist.distributed import mesh as meshes
from liftdist.distributed.mesh import Mesh, together
from liftdist.engine import selection
from liftdist.engine.matrices import Matrix
from liftdist.engine.principal import PrincipalWeights
from liftdist.models import load as models
from liftdist.models import weights
from liftdist.runs.watchdog import Pulse
from liftdist.schema import Config, UserError
from liftdist.training import loss
from liftdist.training.recorder import Console
from liftdist.training.trainer import Inputs

SHOWN_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy")
SHOWN_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
)


def inputs(config: Config, console: Console, part: float = 0.0, pulse: Pulse | None = None) -> Inputs:
    """Check the model's folder and its tokenizer, and tokenise the data. Not collective.

    Raises:
        UserError: whatever is wrong with them.
    """
    pulse = pulse or Pulse()
    folder = preflight.resolve_model(config.model.path)
    hf_config = models.check_type(folder, config.model)
    tokenizer = models.load_tokenizer(folder, config.model)
    text_config = hf_config.get_text_config()
    vocabulary = text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.path {folder}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary} embeddings"
        )

    def samples_of(path: str, split: str) -> data.Samples:
        with console.progress("tokenising", "part") as progress:
            samples = data.tokenise(
                path,
                config.data,
                tokenizer,
                vocabulary,
                Path(config.cache_dir),
                split,
                part,
                pulse.checking(progress),
            )
        longest, context = int(samples.lengths.max()), getattr(text_config, "max_position_embeddings", None)
        if context and longest > context:
            raise UserError(
                f"data.max_length={config.data.max_length}: {path} has a sample of {longest} tokens, "
                f"the model's context is {context}"
            )
        counts = {"truncated": samples.truncated, "dropped": samples.dropped}
        note = "".join(f", {count} {what}" for what, count in counts.items() if count)
        console.say(f"data {path}: {len(samples)} samples, {int(samples.lengths.sum())} tokens{note}")
        return samples

    evaluation = samples_of(config.data.eval_path, config.data.eval_split) if config.data.eval_path else None
    return Inputs(folder, samples_of(config.data.path, config.data.split), evaluation)


def describe_run(run_dir: Path, text: str, mesh: Mesh) -> None:
    """Write config, command and environment, without secrets, so that the folder explains itself."""
    files.write(run_dir / "config.yaml", text)
    with files.open_to_append(run_dir / "command.txt") as file:  # one line an attempt
        file.write(_command() + "\n")
    environment = {
        "liftdist": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in SHOWN_PACKAGES},
        "git": _git_state(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(mesh.device)
        if mesh.device.type == "cuda"
        else platform.processor() or "cpu",
        "mesh": {"dp_replicate": mesh.device_mesh.size(0), "dp_shard": mesh.device_mesh.size(1)},
        "variables": {k: configs.redact(v) for k, v in sorted(os.environ.items()) if k.startswith(SHOWN_ENVIRONMENT)},
    }
    files.write(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def _command() -> str:
    """The command as it was typed, or the rank's own where nobody typed ``liftdist``."""
    typed = os.environ.get("LIFTDIST_COMMAND")
    return shlex.join(map(configs.redact, json.loads(typed) if typed else sys.orig_argv))


def _git_state() -> str | None:
    if not (Path(__file__).parent.parent / "pyproject.toml").exists():
        return None  # installed: a repository around it is somebody else's
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def principal(
    config: Config,
    folder: Path,
    base: str,
    mesh: Mesh,
    console: Console,
    pulse: Pulse | None = None,
    from_checkpoint: bool = False,
) -> tuple[PreTrainedModel, PrincipalWeights]:
    """The sharded model with its base weights, and its principal weights: those in the cache, else selected now, or none yet
    where a checkpoint brings them. ``base`` is the digest of the folder's weights. Collective."""
    pulse = pulse or Pulse()
    model = models.load(folder, config.model, mesh, pulse.check)
    choice = config.selection
    cached = _cached_selection(config, base)

    def known(matrices: list[Matrix]) -> list[Tensor] | None:
        if from_checkpoint:
            return [torch.empty(0, dtype=torch.int32, device=matrix.rows_local.device) for matrix in matrices]
        indices = None
        try:
            indices = selection.read(cached, matrices)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            console.say(f"selection in {cached} ignored: {error}")
        return None if meshes.agree(indices is None) else indices

    kept: dict[str, Tensor] = {}
    if not from_checkpoint:
        console.say(f"selecting principal weights ({choice.method}, filter rank {choice.filter_rank})")
    started = time.perf_counter()
    with console.progress("selecting", "matrix") as progress:
        chosen = PrincipalWeights(
            model,
            density=choice.density,
            budget_rank=choice.budget_rank,
            filter_rank=choice.filter_rank,
            method=choice.method,
            modules=choice.modules,
            replicate_group=mesh.replicate_group,
            initial_indices=known,
            sparse_reduce_scatter=config.mesh.sparse_reduce_scatter,
            progress=pulse.at_boundaries(progress),
            on_selected=lambda name, indices: kept.__setitem__(name, indices.cpu()),
        )
    if meshes.agree(bool(kept)) and not selection.write(cached, kept):
        console.say(f"selection not kept: cache_dir {config.cache_dir} is not shared by all ranks")
    if not meshes.agree(not loss.is_plain(model, mesh.device)):
        loss.in_chunks(model)
    total = sum(matrix.param.numel() for matrix in chosen.matrices)
    everything = sum(param.numel() for param in model.parameters())
    console.say(
        f"{chosen.num_selected} principal weights in {len(chosen.matrices)} matrices: "
        f"{chosen.num_selected / total:.2%} of them, {chosen.num_selected / everything:.2%} of the model's {everything} "
        f"weights ({time.perf_counter() - started:.1f} s)"
    )
    return model, chosen


def _cached_selection(config: Config, digest: str) -> Path:
    choice = config.selection
    parts = [
        digest,
        config.model.dtype,
        choice.density,
        choice.budget_rank,
        choice.filter_rank,
        choice.method,
        choice.modules,
    ]
    key = hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()[:24]
    return Path(config.cache_dir).expanduser() / "selections" / key


def select_only(config: Config, mesh: Mesh, pulse: Pulse) -> None:
    """Select the principal weights and keep them in the cache. Collective."""
    console = Console(mesh.is_main)
    with together():
        folder = preflight.resolve_model(config.model.path)
    base = weights.digest(folder, Path(config.cache_dir), pulse.beat)
    principal(config, folder, base, mesh, console, pulse)
    console.say(f"kept in {_cached_selection(config, base)}")
