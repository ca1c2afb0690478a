"""One run, from a config to a fine-tuned model: ``torchrun -m liftdist.train CONFIG [key=value ...]`` on every rank.

gradient of one optimizer step = (sum over ranks and micro-batches of the gradient of summed token losses)
                                 / (tokens with a label in the global batch)
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from liftdist import __version__, data, delta, preflight, selection
from liftdist import config as configs
from liftdist import mesh as meshes
from liftdist import model as models
from liftdist.config import Config, UserError
from liftdist.mesh import Mesh, PeerError, together
from liftdist.metrics import GIB, Console, Recorder, Stopwatch, memory
from liftdist.principal import PrincipalWeights

SHOWN_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy")
SHOWN_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_",
    "GLOO_",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of a rank. Leaves with 0, with 2 and one line for what the user can put right, with 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m liftdist.train", description="Fine-tune; started on every rank.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--select-only", action="store_true", help="select the principal weights, keep them, stop")
    options = parser.parse_intermixed_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        config, text = configs.load(options.config, options.overrides)
        with meshes.start(config.mesh) as mesh:
            if options.select_only:
                select_only(config, mesh)
            else:
                train(config, mesh, text)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"liftdist: {configs.redact(str(error))}", file=sys.stderr, flush=True)
        _leave(configs.EXIT_USER_ERROR)
    except PeerError:
        _leave(1)  # the rank that failed shows its traceback


def _interrupted(number: int, _: object) -> None:
    """Signal handler: end at once, with one line instead of a traceback from every rank."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print("liftdist: interrupted; what is in the run directory is incomplete", file=sys.stderr, flush=True)
    status = os.environ.get("LIFTDIST_STATUS_FILE")
    if status:
        Path(status).write_text(str(128 + number))
    os._exit(0 if status else 128 + number)


def _leave(code: int) -> None:
    """Exit. The launcher learns the code from a file, as torchrun makes every code 1 and prints a report of its own."""
    status = os.environ.get("LIFTDIST_STATUS_FILE")
    if status:
        Path(status).write_text(str(code))
        sys.exit(0)
    time.sleep(1.0 if int(os.environ.get("LOCAL_RANK", 0)) else 0.0)  # let the speaking rank finish its line
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Set-up.


@dataclass(frozen=True)
class Inputs:
    """What is known before weights are read."""

    folder: Path
    samples: data.Samples
    eval_samples: data.Samples | None


def prepare(config: Config, console: Console, part: float = 0.0) -> Inputs:
    """Check the model's folder and its tokenizer, and tokenise the data. Not collective.

    Raises:
        UserError: whatever is wrong with them.
    """
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
                path, config.data, tokenizer, vocabulary, Path(config.cache_dir), split, part, progress
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
    (run_dir / "config.yaml").write_text(text)
    (run_dir / "command.txt").write_text(_command() + "\n")
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
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _command() -> str:
    """The command as it was typed, or the rank's own where nobody typed ``liftdist``."""
    typed = os.environ.get("LIFTDIST_COMMAND")
    return shlex.join(map(configs.redact, json.loads(typed) if typed else sys.orig_argv))


def _git_state() -> str | None:
    if not (Path(__file__).parent.parent / "launch" / "torchrun").exists():
        return None  # installed: a repository around it is somebody else's
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def load_principal(
    config: Config, folder: Path, mesh: Mesh, console: Console
) -> tuple[PreTrainedModel, PrincipalWeights]:
    """The sharded model and its principal weights, selected now or read from the cache. Collective."""
    model = models.load(folder, config.model, mesh)
    choice = config.selection
    cached = _cached_selection(config, models.digest(folder, Path(config.cache_dir)))

    def from_cache(matrices: list[selection.Matrix]) -> list[Tensor] | None:
        indices = None
        try:
            indices = selection.read(cached, matrices)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            console.say(f"selection in {cached} ignored: {error}")
        return None if meshes.agree(indices is None) else indices

    kept: dict[str, Tensor] = {}
    console.say(f"selecting principal weights ({choice.method}, filter rank {choice.filter_rank})")
    started = time.perf_counter()
    with console.progress("selecting", "matrix") as progress:
        principal = PrincipalWeights(
            model,
            density=choice.density,
            budget_rank=choice.budget_rank,
            filter_rank=choice.filter_rank,
            method=choice.method,
            modules=choice.modules,
            replicate_group=mesh.replicate_group,
            initial_indices=from_cache,
            progress=progress,
            on_selected=lambda name, indices: kept.__setitem__(name, indices.cpu()),
        )
    if meshes.agree(bool(kept)) and not selection.write(cached, kept):
        console.say(f"selection not kept: cache_dir {config.cache_dir} is not shared by all ranks")
    total = sum(matrix.param.numel() for matrix in principal.matrices)
    everything = sum(param.numel() for param in model.parameters())
    console.say(
        f"{principal.num_selected} principal weights in {len(principal.matrices)} matrices: "
        f"{principal.num_selected / total:.2%} of them, {principal.num_selected / everything:.2%} of the model's {everything} "
        f"weights ({time.perf_counter() - started:.1f} s)"
    )
    return model, principal


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


def select_only(config: Config, mesh: Mesh) -> None:
    """Select the principal weights and keep them in the cache. Collective."""
    console = Console(mesh.is_main)
    with together():
        folder = preflight.resolve_model(config.model.path)
    load_principal(config, folder, mesh, console)
    console.say(f"kept in {_cached_selection(config, models.digest(folder, Path(config.cache_dir)))}")


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the losses of all labelled tokens of a micro-batch, float32.

    Logits are computed for labelled places alone, where the model can.
    """
    labels = batch["labels"]
    places = (labels != data.IGNORED).any(0).nonzero().squeeze(1)
    if not places.numel():
        places = places.new_zeros(1)
    chosen = {"logits_to_keep": places} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **chosen).logits
    logits, labels = logits if chosen else logits[:, places], labels[:, places]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=data.IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, samples: data.Samples, config: Config, mesh: Mesh) -> float:
    """Mean loss over all labelled tokens of ``samples``. Collective."""
    model.eval()
    everything = [[sample] for sample in range(len(samples))]
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for micro in data.deal(everything, samples.lengths, mesh.rank, mesh.world_size, config.train.micro_batch_size):
        batch = {key: value.to(mesh.device) for key, value in data.collate(samples, micro).items()}
        totals += torch.stack([token_losses(model, batch).double(), (batch["labels"] != data.IGNORED).sum()])
    model.train()
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


class Trainer:
    """The state of a run and one optimizer step of it."""

    def __init__(
        self, config: Config, mesh: Mesh, inputs: Inputs, model: PreTrainedModel, principal: PrincipalWeights
    ) -> None:
        self.config, self.mesh, self.inputs, self.model, self.principal = config, mesh, inputs, model, principal
        optimizer, train = config.optimizer, config.train
        self.order = data.BatchOrder(
            inputs.samples.lengths, train.seed, config.data.packing, config.data.max_length, train.batch_size
        )
        self.epochs = train.epochs if train.steps is None else None
        self.steps = train.steps or self.order.steps(train.epochs)
        self.optimizer = torch.optim.AdamW(
            [principal.values],
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        name = "constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule
        warmup = round(optimizer.warmup_ratio * self.steps)
        self.schedule = get_scheduler(name, self.optimizer, num_warmup_steps=warmup, num_training_steps=self.steps)
        self.watch = Stopwatch(mesh.device)
        self.step = 0
        self.consumed = 0  # sequences, over all ranks and epochs: with the seed, the whole data state

    def run_step(self) -> dict[str, float]:
        """One optimizer step; returns its figures. Collective.

        Raises:
            UserError: loss or gradient is not finite, on any rank; nothing has been updated then.
        """
        self.step += 1
        figures: dict[str, float] = {}
        interval = self.config.selection.refresh_interval
        if interval and self.step % interval == 0:
            with self.watch("refresh"):
                figures["selection/survived"] = self.principal.refresh(self.optimizer)
        sequences = self.order.batch(self.consumed, self.epochs)
        lengths = self.inputs.samples.lengths
        micro_batches = data.deal(
            sequences, lengths, self.mesh.rank, self.mesh.world_size, self.config.train.micro_batch_size
        )
        loss_and_labels = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        tokens = 0
        for micro in micro_batches:
            with self.watch("data"):
                batch = {
                    key: value.to(self.mesh.device) for key, value in data.collate(self.inputs.samples, micro).items()
                }
                tokens += sum(int(lengths[sample]) for sequence in micro for sample in sequence)
            with self.watch("forward_backward"):
                loss = token_losses(self.model, batch)
                loss.backward()
                labelled = (batch["labels"] != data.IGNORED).sum()
                loss_and_labels += torch.stack([loss.detach().double(), labelled])
        with self.watch("exchange"):
            dist.all_reduce(loss_and_labels)
            self.principal.reduce_gradients(loss_and_labels[1].float())
            norm = self.principal.clip_grad_norm_(self.config.optimizer.max_grad_norm)
        mean_loss = (loss_and_labels[0] / loss_and_labels[1]).item()
        if not math.isfinite(mean_loss + norm.item()):  # sums over all ranks: all ranks see the same
            raise UserError(
                f"step {self.step}: loss {mean_loss}, gradient norm {norm.item()}: training diverged; "
                f"lower optimizer.lr={self.config.optimizer.lr} or set optimizer.max_grad_norm"
            )
        figures |= {"train/loss": mean_loss, "train/lr": self.schedule.get_last_lr()[0], "train/grad_norm": norm.item()}
        with self.watch("update"):
            if self.config.optimizer.reference_numerics:
                # (sqrt(v) / sqrt(c) + eps / sqrt(c)) is the authors' (sqrt(v) + eps) / sqrt(c), c = 1 - beta2^t
                correction = 1 - self.config.optimizer.betas[1] ** self.step
                self.optimizer.param_groups[0]["eps"] = self.config.optimizer.eps / correction**0.5
            self.optimizer.step()
            self.principal.scatter()
            self.schedule.step()
        self.consumed += len(sequences)
        figures["train/sequences"] = self.consumed
        figures["local/tokens"] = tokens
        return figures


def train(config: Config, mesh: Mesh, text: str) -> None:
    """Run ``config`` to its end on all ranks; ``text`` is the config as it is kept in the run directory. Collective."""
    console = Console(mesh.is_main)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with together():
        preflight.check_cache_dir(config)
        if mesh.is_main:
            preflight.open_run_dir(config)
        inputs = prepare(config, console, mesh.rank / mesh.world_size)
    run_dir = Path(config.run_dir).expanduser()
    model, principal = load_principal(config, inputs.folder, mesh, console)
    model.train()
    trainer = Trainer(config, mesh, inputs, model, principal)
    with together():
        if mesh.is_main:  # not before: what failed until here can be put right and started again with the same run_dir
            describe_run(run_dir, text, mesh)
        recorder = Recorder(run_dir, mesh.is_main)
    recorder.text("config", text)
    recorder.text("parameters", _parameter_counts(model, principal))
    console.say(
        f"{trainer.steps} steps of {config.train.batch_size} sequences on {mesh.world_size} ranks "
        f"(dp_replicate {mesh.device_mesh.size(0)} x dp_shard {mesh.device_mesh.size(1)}); run directory {run_dir}"
    )
    try:
        _loop(trainer, recorder, console)
    finally:
        recorder.close()
    if config.train.export:
        delta.export_merged(model, inputs.folder, run_dir / "export", mesh)
        console.say(f"fine-tuned model in {run_dir / 'export'}")


def _loop(trainer: Trainer, recorder: Recorder, console: Console) -> None:
    config, mesh = trainer.config, trainer.mesh

    def evaluated() -> None:
        if trainer.inputs.eval_samples is not None:
            loss = evaluate(trainer.model, trainer.inputs.eval_samples, config, mesh)
            recorder.scalars(trainer.step, {"eval/loss": loss})
            console.say(f"step {trainer.step}: evaluation loss {loss:.4f}")

    evaluated()
    trainer.watch.read()
    began, first, tokens = time.perf_counter(), trainer.step, 0.0
    with console.progress("training", "step", trainer.steps) as progress:
        while trainer.step < trainer.steps:
            figures = trainer.run_step()
            tokens += figures.pop("local/tokens")
            if trainer.step % config.train.log_interval == 0 or trainer.step == trainer.steps:
                elapsed = time.perf_counter() - began
                figures |= rank_figures(trainer, elapsed, trainer.step - first, tokens)
                recorder.scalars(trainer.step, figures)
                left = figures["time/step"] * (trainer.steps - trainer.step)
                progress.step(trainer.step, trainer.steps, _note(figures), left)
                began, first, tokens = time.perf_counter(), trainer.step, 0.0
            interval = config.train.eval_interval
            if interval and trainer.step % interval == 0 and trainer.step < trainer.steps:
                paused = time.perf_counter()
                evaluated()
                began += time.perf_counter() - paused
    evaluated()


def rank_figures(trainer: Trainer, elapsed: float, steps: int, tokens: float) -> dict[str, float]:
    """Throughput, time by phase and memory of every rank, over the last ``steps`` steps of ``elapsed`` s. Collective."""
    phases = trainer.watch.read()
    ranks = meshes.gather({"tokens": tokens, "phases": phases, "memory": memory(trainer.mesh.device)})
    total = sum(rank["tokens"] for rank in ranks)
    figures = {
        "throughput/tokens_per_second": total / elapsed,
        "throughput/tokens_per_second_per_rank": total / elapsed / len(ranks),
        "throughput/data_wait_share": max(rank["phases"].get("data", 0.0) for rank in ranks) / elapsed,
        "time/step": elapsed / steps,
    }
    for phase in ("forward_backward", "exchange", "update", "refresh"):
        figures[f"time/{phase}"] = max(rank["phases"].get(phase, 0.0) for rank in ranks) / steps
    for number, rank in enumerate(ranks):
        figures |= {f"memory_gib/{key}/rank{number}": value for key, value in rank["memory"].items()}
    return figures


def _note(figures: dict[str, float]) -> str:
    peaks = [value for key, value in figures.items() if "/device_peak/" in key or "/host_peak/" in key]
    on_device = [value for key, value in figures.items() if "/device_peak/" in key]
    return (
        f"loss {figures['train/loss']:.4f}  {figures['throughput/tokens_per_second']:.0f} tokens/s  "
        f"peak {max(on_device or peaks):.1f} GiB"
    )


def _parameter_counts(model: nn.Module, principal: PrincipalWeights) -> str:
    everything = sum(param.numel() for param in model.parameters())
    fullest = max(meshes.gather(principal.values.numel()))
    lines = [
        f"weights of the model      {everything}",
        f"principal weights         {principal.num_selected} ({principal.num_selected / everything:.2%})",
        f"on the fullest rank       {fullest} ({fullest * 20 / GIB:.3f} GiB of values, gradient, moments and indices)",
    ]
    lines += [f"{matrix.name}  {list(matrix.param.shape)}  {matrix.num_selected}" for matrix in principal.matrices]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
