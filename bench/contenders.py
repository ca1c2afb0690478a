"""Ways to fine-tune the same model on the same batch under the same FSDP2 sharding.

full      this library's method=full: all weights, float32 shards, bf16 compute, fused AdamW; 16 B per parameter
lora      this library's method=lora: adapters on all linear modules, with as many trained weights as the others
masked    LIFT as in its authors' code for one device: a full SVD of each matrix, a bool mask and a dense gradient per matrix,
          Adam on the masked entries in a loop over parameters
dense     liftdist's trained matrices with dense gradients and no hooks: the baseline for the cost of the hooks
liftdist  this library
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from liftdist.console import Console
from liftdist.distributed.mesh import Mesh
from liftdist.distributed.sharding import local_tensor, rows_of
from liftdist.engine.adamw import PrincipalAdamW
from liftdist.engine.criteria import low_rank
from liftdist.engine.matrices import principal_matrices
from liftdist.engine.principal import PrincipalWeights
from liftdist.methods.lift import rules
from liftdist.models import build, names
from liftdist.models.head import in_chunks
from liftdist.models.load import compute_buffers, shard
from liftdist.registry import METHODS
from liftdist.runs.context import RunContext
from liftdist.schema import Config
from liftdist.training import objective
from liftdist.training.losses.cross_entropy import per_token

LR = 1e-5


class Contender(ABC):
    """A sharded model and its optimizer."""

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    optimizer: Any

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, sharded: bool = False, bf16: bool = False) -> None:
        self.config, self.mesh, self.sharded, self.bf16 = config, mesh, sharded, bf16
        self.model: Any = model
        self.model = self.prepare(model)
        self.model.train()

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """Shard the model and make the optimizer."""

    def shard_mesh(self) -> Any:
        return self.mesh.shard_mesh

    def shard(self, model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
        if self.sharded:
            return model
        for layer in build.decoder_layers(model):
            fully_shard(layer, mesh=self.shard_mesh(), mp_policy=policy or self.policy)
        return fully_shard(model, mesh=self.shard_mesh(), mp_policy=policy or self.policy)

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return per_token(logits.flatten(0, 1), batch["labels"].to(logits.device).flatten()).sum()

    def forward_backward(self, batch: dict[str, Tensor]) -> float:
        """Forward and backward of a micro-batch; returns the mean loss."""
        mean = self.losses(batch) / batch["labels"].numel()
        mean.backward()
        return mean.item()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        states = self.optimizer.state.values()
        return sum(local_tensor(t).nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def checkpoint_bytes(self) -> int:
        """Bytes that this rank must save to continue: trained weights and optimizer state."""
        return self.state_bytes() + sum(local_tensor(p).nbytes for p in self.model.parameters() if p.requires_grad)


class OfMethod(Contender):
    """A method of this library that trains whole parameters, as a run attaches it."""

    name: str

    def settings(self, model: nn.Module) -> Config:  # noqa: ARG002
        config = copy.deepcopy(self.config)
        config.method, config.optimizer.lr = self.name, LR
        return config

    def prepare(self, model: Any) -> nn.Module:
        config, chosen = self.settings(model), METHODS.load(self.name)
        stored = names.same(build.tensors(model))
        chosen.extend(config, model)
        for module in model.modules():
            if any(param.is_meta for param in module.parameters(recurse=False)):
                module.to_empty(device=self.mesh.device, recurse=False)
        stored = chosen.prepare(config, model, stored)
        shard(model, config.model, self.mesh)
        self.method = chosen.attach(RunContext(config, self.mesh, Console(False)), model, stored, "")
        in_chunks(model)
        self.optimizer = self.method.optimizer
        return model

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return objective.token_losses(self.model, batch)

    def update(self) -> None:
        self.method.reduce(torch.ones((), device=self.mesh.device))
        self.method.step()


class Full(OfMethod):
    name = "full"

    def settings(self, model: nn.Module) -> Config:
        config = super().settings(model)
        config.optimizer.dtype = "bfloat16" if self.bf16 else "float32"
        return config


class Lora(OfMethod):
    name = "lora"

    def settings(self, model: nn.Module) -> Config:
        config = super().settings(model)
        config.lora.rank = equal_rank(model, config.selection.density)
        config.lora.alpha = 2 * config.lora.rank
        return config


class Dense(Contender):
    def prepare(self, model: nn.Module) -> nn.Module:
        self.shard(model)
        trained = [place.param for place in principal_matrices(model).values()]
        kept = {id(param) for param in trained}
        for param in model.parameters():
            param.requires_grad_(id(param) in kept)
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        return model


class Hybrid(Dense):
    """Dense, with FSDP2's hybrid sharding: replicas reduce whole gradients, too."""

    def shard_mesh(self) -> Any:
        return self.mesh.device_mesh


class Masked(Dense):
    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        self.masks, self.moments, self.steps = [], [], 0
        for param in self.trained:
            whole = param.full_tensor() if isinstance(param, DTensor) else param.detach()
            count = round(self.config.selection.density * whole.numel())
            mask = torch.zeros(whole.numel(), dtype=torch.bool, device=whole.device)
            mask[self.chosen(whole, count)] = True
            mask = mask.view_as(whole)
            begin, end = rows_of(param)
            self.masks.append(mask[begin:end].clone())
            size = int(self.masks[-1].sum())
            self.moments.append(torch.zeros(2, size, dtype=whole.dtype, device=whole.device))
        return model

    def chosen(self, whole: Tensor, count: int) -> Tensor:
        """Flat indices ``[count]`` of the weights of a matrix to train."""
        u, s, vh = torch.linalg.svd(whole.float(), full_matrices=False)
        rank = self.config.selection.filter_rank
        return ((u[:, :rank] * s[:rank]) @ vh[:rank]).abs().flatten().topk(count).indices

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        beta1, beta2, eps = 0.9, 0.95, 1e-6
        scale = LR * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        for param, mask, (first, second) in zip(self.trained, self.masks, self.moments, strict=True):
            weight, gradient = local_tensor(param), local_tensor(param.grad)[mask]
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            weight[mask] = weight[mask] - scale * first / second.sqrt().add_(eps)
            param.grad = None

    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.moments, *self.masks))


class QuicklyMasked(Masked):
    """Masked, with liftdist's fast selection, for benchmarks that time steps only."""

    def chosen(self, whole: Tensor, count: int) -> Tensor:
        return low_rank.select(whole, count, self.config.selection.filter_rank)


class Liftdist(Contender):
    def prepare(self, model: nn.Module) -> nn.Module:
        self.shard(model)
        in_chunks(model)
        criterion, budget = rules(self.config.selection)
        self.principal = PrincipalWeights(
            model,
            criterion=criterion,
            budget=budget,
            replicate_group=self.mesh.replicate_group,
            dtype=getattr(torch, self.config.optimizer.dtype),
            keep_base=self.config.keeps_base,
            backwards=self.backwards,
        )
        self.optimizer = PrincipalAdamW(self.principal, lr=LR)
        return model

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return objective.token_losses(self.model, batch)

    def backwards(self, number: int) -> Iterator[Tensor]:
        """For criteria by gradients: of random batches."""
        rows, length = self.config.train.micro_batch_size, self.config.data.max_length
        given = batches(self.model.config.vocab_size, rows, length, self.mesh.device, self.mesh.rank)
        for batch in itertools.islice(given, number):
            loss = self.losses(batch)
            loss.backward()
            yield loss.detach()

    def update(self) -> None:
        self.principal.reduce_gradients()
        self.optimizer.step()

    def state_bytes(self) -> int:
        return super().state_bytes() + sum(indices.nbytes for indices in self.principal.indices)

    def checkpoint_bytes(self) -> int:
        return self.state_bytes() + self.principal.values.nbytes


KINDS: dict[str, type[Contender]] = {
    "full": Full, "lora": Lora, "masked": Masked, "quickly-masked": QuicklyMasked, "dense": Dense, "hybrid": Hybrid,
    "liftdist": Liftdist,
}  # fmt: skip


def equal_rank(model: nn.Module, density: float) -> int:
    """The rank of adapters with as many weights as ``density`` of the matrices has."""
    shapes = [place.shape for place in principal_matrices(model).values()]
    return round(sum(round(density * m * n) for m, n in shapes) / sum(m + n for m, n in shapes))


def load(folder: Any, device: torch.device) -> nn.Module:
    """The whole model in bf16 on every rank; sharding frees it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    model.config.use_cache = False
    return model


def slow_spectrum(m: int, n: int, device: torch.device, power: float = 0.4, seed: int = 0) -> Tensor:
    """``[m, n]`` float32 with singular values ``i ** -power``."""
    generator = torch.Generator().manual_seed(seed)
    if m < n:
        return slow_spectrum(n, m, device, power, seed).T.contiguous()
    u = torch.linalg.qr(torch.randn(m, n, generator=generator).to(device)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator).to(device)).Q
    return (u * torch.arange(1, n + 1, device=device).float() ** -power) @ v.T


@torch.no_grad()
def synthetic(shape: dict[str, Any], device: torch.device) -> nn.Module:
    """A model of transformers' Llama in bf16 whose linear weights have the spectrum of :func:`slow_spectrum`."""
    with torch.device(device), transformers.initialization.no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16
        )
    made: dict[
        tuple[int, ...], Tensor
    ] = {}  # one per shape; each parameter permutes its rows, which keeps the spectrum
    for number, param in enumerate(model.parameters()):
        if param.ndim < 2:
            param.fill_(1.0)
        elif max(param.shape) > 4 * min(param.shape):
            param.normal_(std=0.02)
        else:
            key = tuple(param.shape)
            if key not in made:
                made[key] = slow_spectrum(*key, device)
                made[key] *= 0.02 * math.sqrt(param.numel()) / made[key].norm()
            order = torch.randperm(key[0], generator=torch.Generator().manual_seed(number))
            param.copy_(made[key][order.to(device)])
    compute_buffers(model)
    model.config.use_cache = False
    return model


def batches(
    vocabulary: int, rows: int, length: int, device: torch.device, seed: int, packed: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Random tokens, all labelled; with ``packed``, two samples per sequence. Labels stay on the host, as in the trainer."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length, device=device).remainder(-(-length // 2) if packed else length).expand(rows, -1)
    while True:
        tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
        yield {"input_ids": tokens.to(device), "position_ids": positions, "labels": tokens.roll(-1, 1)}
