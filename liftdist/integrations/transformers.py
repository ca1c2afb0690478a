"""transformers' ``Trainer`` on the principal weights, on one process or sharded by FSDP2 through accelerate.

    create_optimizer     accelerate shards a model only together with an optimizer of its parameters: it gets one that never steps
    create_scheduler     the model is sharded now: select, freeze, and put the optimizer of the flat vector in its place
    on_step_begin        refresh, if it is due
    backward             hooks take the principal gradient of each micro-batch; the trainer divides the loss by all its items,
                         times the ranks, which FSDP2's mean over them undoes
    on_pre_optimizer_step    clip the norm over all shards; the trainer's own clipping finds no gradient
    step                 AdamW, and the values are written into the model

A checkpoint holds beside the trainer's files one of each rank, as :meth:`PrincipalWeights.state_dict` returns it:

    checkpoint-100/lift-00000-of-00002.safetensors      metadata: scalars of optimizer and selection, a sum over the base model

The state is what a run holds beyond its base model, so a resume starts from the base model, too; the sum recognises it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback

from liftdist.distributed.collectives import together
from liftdist.distributed.sharding import local_tensor
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.principal import PrincipalWeights
from liftdist.errors import UserError
from liftdist.safetensors_io import TensorFile, save

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size
_SCHEDULER = "scheduler.pt"  # as the trainer names it


class LiftTrainer(Trainer):
    """A ``Trainer``; or the first base class of one: ``class Mine(LiftTrainer, ItsTrainer)``.

    All arguments of the trainer apply: learning rate, schedule, betas, epsilon, weight decay (of principal weights, towards
    zero), ``max_grad_norm``, accumulation, saving and resuming. Those that cannot are refused.

    Args:
        lift: arguments of :class:`PrincipalWeights`, such as ``dict(density=0.05, filter_rank=64)``.
        refresh_interval: select again before the forward of every so many steps; 0: never.

    Attributes:
        principal: the principal weights, from the start of :meth:`train`.

    Raises:
        UserError: an argument that would not be honoured; of :meth:`train`, a checkpoint that does not fit, a gradient that is
            not finite.
    """

    principal: PrincipalWeights | None = None

    def __init__(self, *args: Any, lift: Mapping[str, Any], refresh_interval: int = 0, **kwargs: Any) -> None:
        inspect.signature(PrincipalWeights).bind(None, **lift)  # a name that it does not know raises here
        if refresh_interval < 0:
            raise UserError(f"refresh_interval must be 0 or more, got {refresh_interval}")
        super().__init__(*args, **kwargs)
        self._lift, self.refresh_interval = dict(lift), refresh_interval
        self.principal_grad_norm = 0.0  # of the last step, before clipping
        for is_set, refusal in _refusals(self):
            if is_set:
                raise UserError(refusal)
        self.add_callback(_Steps(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.principal is not None:
            raise UserError("train() ran already: make a new trainer, from the base model, to resume or to train again")
        # else FSDP2 would keep dense gradients from one micro-batch to the next
        self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
            plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)
        self.optimizer = torch.optim.SGD((model or self.model).parameters())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.principal is None:
            self._attach()
        return super().create_scheduler(num_training_steps, optimizer)

    def _attach(self) -> None:
        """Select the principal weights of the model, which is sharded and on its device. Collective."""
        self._base = _sum_of_bits(self.model)
        self.principal = PrincipalWeights(self.model, **self._lift)
        self.adamw = PrincipalAdamW(
            self.principal,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        wrapper: Any = self.optimizer  # accelerate's
        wrapper.optimizer = self.adamw

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            logs["grad_norm"] = self.principal_grad_norm
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.principal is not None
        path = self._state_file(output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "scalars": json.dumps(self.principal.scalar_states(self.adamw)),
            "lr": json.dumps(self.adamw.param_groups[0]["lr"]),  # a schedule sets it after a step, for the next
            "step": str(self.state.global_step),
            "base": str(self._base),
        }
        with together():
            save(self.principal.state_dict(self.adamw), path, metadata)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the state of the principal weights is loaded into the base model."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.principal is not None
        path = self._state_file(checkpoint)
        with together():
            if not path.exists():
                raise UserError(f"{path} is missing: resume a checkpoint of this trainer, on as many ranks as saved it")
            file = TensorFile(path)
            if file.metadata["step"] != str(self.state.global_step):
                raise UserError(
                    f"{path} is of step {file.metadata['step']}, the checkpoint of {self.state.global_step}"
                )
            if file.metadata["base"] != str(self._base):
                raise UserError(f"{checkpoint} was trained from another model, or dtype: give the base model to resume")
            tensors = {name: file.read(name) for name in file.entries}
        self.principal.load_state_dict(tensors, self.adamw, json.loads(file.metadata["scalars"]))
        self.adamw.param_groups[0]["lr"] = json.loads(file.metadata["lr"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, _SCHEDULER), weights_only=True))

    def _state_file(self, folder: str) -> Path:
        return Path(folder, f"lift-{self.args.process_index:05d}-of-{self.args.world_size:05d}.safetensors")


class _Steps(TrainerCallback):
    """What a step does besides forward, backward and the optimizer."""

    def __init__(self, trainer: LiftTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        interval = self.trainer.refresh_interval
        if interval and (state.global_step + 1) % interval == 0:
            assert self.trainer.principal is not None
            self.trainer.principal.refresh(self.trainer.adamw)

    def on_pre_optimizer_step(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        principal = self.trainer.principal
        assert principal is not None
        principal.reduce_gradients()
        norm = principal.clip_grad_norm_(args.max_grad_norm or None).item()
        if not math.isfinite(norm):
            raise UserError(
                f"step {state.global_step + 1}: the norm of the gradient is {norm}; lower the learning rate"
            )
        self.trainer.principal_grad_norm = norm


def _sum_of_bits(model: nn.Module) -> int:
    """A number that tells models apart: the sum of all their weights, read as integers. Exact in any order. Collective."""
    locals_ = [local_tensor(param) for param in model.parameters()]
    sums = [local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64) for local in locals_]
    total = torch.stack(sums).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def _refusals(trainer: Trainer) -> Iterator[tuple[bool, str]]:
    """Whether what would not be honoured is asked for, and what to do instead."""
    args, accelerator = trainer.args, trainer.accelerator
    kind, state = accelerator.distributed_type, accelerator.state
    sharded = kind == DistributedType.FSDP
    yield (
        kind not in (DistributedType.NO, DistributedType.FSDP) or args.n_gpu > 1,
        f"{kind.value} on {args.world_size} processes, {args.n_gpu} GPUs each, is not supported: shard with FSDP2, "
        "TrainingArguments(fsdp=True) under torchrun",
    )
    yield sharded and state.fsdp_plugin.fsdp_version != 2, "fsdp_config: FSDP1 is not supported; set version 2"
    offloads = sharded and isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    yield offloads, "fsdp_config: cpu_offload is not supported; the optimizer state is small, remove it"
    checkpointing = sharded and state.fsdp_plugin.activation_checkpointing
    yield bool(checkpointing), "fsdp_config: activation_checkpointing renames the modules; use the training argument"
    reentrant = args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get("use_reentrant")
    yield (
        bool(reentrant),
        "activation_checkpointing_kwargs: use_reentrant finds no gradient above frozen embeddings; remove it",
    )
    yield trainer.is_distributed_loading_by_transformers, "distributed_config: load the model whole, FSDP2 shards it"
    yield accelerator.parallelism_config is not None, "parallelism_config is not supported; remove it"
    yield state.dynamo_plugin.backend != DynamoBackend.NO, "torch_compile is not supported; remove it"
    yield args.fp16, "fp16 is not supported: no gradient is unscaled; use bf16, or a model in bfloat16"
    yield (
        args.optim not in ("adamw_torch", "adamw_torch_fused") or bool(args.optim_args),
        f"optim={args.optim.value}, optim_args={args.optim_args} is not supported: principal weights have adamw_torch_fused",
    )
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None or trainer.lr_scheduler
    yield bool(given), "optimizers and optimizer_cls_and_kwargs are not supported: the principal weights have their own"
    yield bool(args.optim_target_modules), "optim_target_modules is not supported; give lift=dict(modules=...)"
    yield trainer.model_init is not None, "model_init is not supported; give the model"
    yield hasattr(trainer.model, "peft_config"), "the model has an adapter of peft: give the model without it"
    yield (
        args.load_best_model_at_end,
        "load_best_model_at_end is not supported; load the checkpoint of lowest loss yourself",
    )
    yield args.auto_find_batch_size, "auto_find_batch_size is not supported; set per_device_train_batch_size"
