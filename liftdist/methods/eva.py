"""EVA (arXiv 2410.07170): adapters start from the inputs of their modules, by peft's own incremental decomposition.

    A_0 [rank, n] = the right singular vectors of a module's inputs [tokens, n], less their mean, of the largest singular values
    rank          = how many of a module's vectors are among those that explain most, of all modules: lora.rank on average, and
                    lora.rank * rho at most

The inputs are those of the run's first ``lora.eva.batches`` batches (:mod:`liftdist.training.gradients`) on the base model, at
the positions that predict a label. Each shard of a replica runs its share of a batch, and what the modules saw is gathered in
the batch's order, so that the vectors do not depend on the ranks but for rounding. peft goes through the batches again until the
cosine of each vector with that of the batch before is ``tau``, as rank 0 sees it. Deviations: peft takes the tokens that are
labels, one position later; adapters are made for the highest rank, and what a module is not allotted is zero and stays so, as
its gradient is zero.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from liftdist.distributed import collectives
from liftdist.errors import UserError
from liftdist.method_settings import LoraConfig

PASSES = 20  # over all batches, after which peft would go on for ever


class Passes(Protocol):
    """Runs a number of batches, and calls ``before`` ahead of a batch's forward with which of its positions predict a label,
    ``[B, L]`` bool."""

    def __call__(self, number: int, before: Callable[[Tensor], None]) -> Iterable[Tensor]: ...


def directions(
    model: nn.Module, layers: Mapping[str, Any], settings: LoraConfig, passes: Passes, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """``[rank, n]`` float32, the first rows of each module's A, most important first. Collective.

    Args:
        group: the ranks that share a batch.

    Raises:
        UserError: they have not converged after :data:`PASSES` passes over the batches, as where these have too few labels; or
            a module does not see each token once.
    """
    import peft
    from peft.tuners.lora.eva import SVDHook

    names = {f"model.{name}.base_layer": name for name in layers}
    config = peft.LoraConfig(
        r=settings.rank,
        target_modules=list(names),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=settings.eva.rho, tau=settings.eva.tau),
    )
    chosen: dict[str, Tensor] = {}
    is_first = True  # the pass from which peft learns which modules share their inputs: it hashes them value by value

    def note(predict: Tensor) -> None:
        chosen["positions"] = predict.flatten()

    def run() -> Iterator[Tensor]:
        nonlocal is_first
        yield from passes(1, note)
        is_first = False
        for _ in range(PASSES):
            yield from passes(settings.eva.batches, note)

    forwards = run()

    def forward(*_: Any) -> None:
        if next(forwards, None) is None:
            raise UserError(
                f"lora.eva: has not converged after {PASSES} passes over {settings.eva.batches} batches, of which those count "
                f"that have lora.rank * lora.eva.rho = {settings.places} labels; raise train.micro_batch_size, or lower "
                f"lora.eva.tau"
            )
        hooks = [
            hook
            for layer in layers.values()
            for hook in layer.base_layer._forward_hooks.values()
            if isinstance(hook, SVDHook) and hasattr(hook.svd, "components_")
        ]
        found = [(hook.converged.cpu(), hook.svd.explained_variance_ratio_.cpu()) for hook in hooks]
        for hook, (converged, ratio) in zip(
            hooks, collectives.gather(found)[0], strict=True
        ):  # ranks that round differently
            device = hook.svd.explained_variance_ratio_.device
            hook.converged, hook.svd.explained_variance_ratio_ = converged.to(device), ratio.to(device)

    def inputs_of(given: tuple[Tensor], _batch: Any, _name: str) -> Tensor:
        rows = given[0].flatten(0, -2)
        found = _of_all(rows[chosen["positions"].to(rows.device)], group)
        return _digest(found) if is_first else found

    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        contextlib.redirect_stdout(None),
    ):  # peft's: skipped batches
        _check(layers, passes)
        found = peft.get_eva_state_dict(
            nn.ModuleDict({"model": model}),
            [{}] * settings.eva.batches,
            config,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda *_: None,
            prepare_layer_inputs_fn=inputs_of,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    return {names[name]: rows for name, rows in found.items()}


def _check(layers: Mapping[str, Any], passes: Passes) -> None:
    """Raises ``UserError`` for a module that on some rank does not see each token of a batch once. Collective."""
    seen, tokens = dict.fromkeys(layers, 0), [0]

    def count(name: str, _module: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[name] += len(given[0].flatten(0, -2))

    handles = [layer.base_layer.register_forward_hook(functools.partial(count, name)) for name, layer in layers.items()]
    for _ in passes(1, lambda predict: tokens.append(predict.numel())):
        pass
    for handle in handles:
        handle.remove()
    with collectives.together():
        for name, rows in seen.items():
            if rows != sum(tokens):
                how = "does not see each token once" if rows else "is not called"
                raise UserError(f"lora.modules: {name} {how}, which lora.variant=eva needs; leave it out")


def _of_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows ``[own, n]`` of each rank of a group, one after another, ``[all, n]``. Collective."""
    ranks = dist.get_process_group_ranks(group)
    counts = torch.empty(len(ranks), dtype=torch.int64, device=rows.device)
    collectives.all_gather_single(counts, counts.new_tensor([len(rows)]), group=group)
    found = rows.new_empty(int(counts.sum()), rows.shape[1])
    for rank, part in zip(ranks, found.split(counts.tolist()), strict=True):
        if rank == dist.get_rank():
            part.copy_(rows)
        if len(part):
            dist.broadcast(part, rank, group=group)
    return found


def _digest(rows: Tensor) -> Tensor:
    """``[32]`` uint8 on the host: the sha256 of ``rows [k, n]``."""
    held = rows.cpu().contiguous().view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(hashlib.sha256(held.data).digest()), dtype=torch.uint8)
