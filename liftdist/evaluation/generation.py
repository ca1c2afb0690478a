"""Answers of a model that FSDP2 shards: each rank gathers all of it once, and answers its share of the prompts.

    unshard -> batches of prompts of similar length, dealt over the ranks -> transformers' generate -> reshard

Prompts are padded on the left, with a mask. No collective runs between unshard and reshard: ranks need not
answer equally many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from liftdist.distributed import collectives
from liftdist.distributed.sharding import fsdp_modules, reshard
from liftdist.errors import UserError
from liftdist.evaluation_settings import TaskConfig
from liftdist.models.head import evaluating, text_inputs

BATCH_SIZE = 16  # prompts of a pass, at most
Result = TypeVar("Result")


class Answering(Protocol):
    """A model to be asked, wherever it is. ``beat`` is called again and again, and what it raises ends the call."""

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        task: TaskConfig,
        stops: Sequence[int],
        seed: int,
        beat: Callable[[], None],
    ) -> list[list[int]]:
        """What the model says to each of ``prompts``, token ids.

        Args:
            stops: tokens that end an answer, and are no part of it.
            seed: of sampling.
        """

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], beat: Callable[[], None]
    ) -> list[float]:
        """The log-likelihood of each continuation after its prompt, pairs of token ids, in nats."""


@dataclass(frozen=True)
class Unsharded:
    """Within :func:`unsharded`. Methods as of :class:`Answering`."""

    model: PreTrainedModel

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        task: TaskConfig,
        stops: Sequence[int],
        seed: int,
        beat: Callable[[], None],
        keep_end: bool = False,
    ) -> list[list[int]]:
        """With ``keep_end`` the token that ended an answer is part of it."""
        found: list[list[int]] = [[] for _ in prompts]

        def said(batch: list[int]) -> list[list[int]]:
            torch.manual_seed(seed + batch[0])
            return _generate(self.model, [prompts[place] for place in batch], task, stops, beat)

        for batch in _batches([len(prompt) for prompt in prompts]):
            for place, tokens in _in_memory(batch, said):
                end = next((number for number, token in enumerate(tokens) if token in stops), len(tokens))
                found[place] = tokens[: end + keep_end]
        return found

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], beat: Callable[[], None]
    ) -> list[float]:
        found = [0.0] * len(pairs)
        for batch in _batches([len(prompt) + len(continuation) for prompt, continuation in pairs]):
            for place, nats in _in_memory(batch, lambda part: self._likelihoods([pairs[place] for place in part])):
                found[place] = nats
            beat()
        return found

    def _likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Of a batch."""
        device = next(self.model.parameters()).device
        rows = [[*prompt, *continuation] for prompt, continuation in pairs]
        width = max(map(len, rows))  # padded on the right, where no token sees it
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        positions = torch.arange(width, device=device).expand_as(ids)
        with evaluating(self.model):
            logits: Tensor = self.model(**text_inputs(self.model, self.model.config, ids, positions)).logits
        found = []
        for row, (prompt, continuation) in enumerate(pairs):
            begin, end = len(prompt), len(prompt) + len(continuation)
            of_tokens = logits[row, begin - 1 : end - 1].float().log_softmax(-1)
            found.append(float(of_tokens.gather(1, ids[row, begin:end, None]).double().sum()))
        return found


@contextlib.contextmanager
def unsharded(model: PreTrainedModel) -> Iterator[Unsharded]:
    """Within the context every rank holds all parameters, and forwards need no other rank. Collective.

    Raises:
        UserError: a rank has no room for them.
    """
    modules = fsdp_modules(model)
    device = next(model.parameters()).device
    missing = sum(param.numel() * param.element_size() for param in model.parameters() if isinstance(param, DTensor))
    if collectives.agree(device.type == "cuda" and missing > 0.9 * _free(device)):
        raise UserError(
            f"eval.tasks: answers need the whole model, {missing / 2**30:.1f} GiB, on every rank, which has no room for it; "
            f"leave them out, and evaluate the exported model"
        )
    groups = [module._get_fsdp_state()._fsdp_param_group for module in modules]
    kept = [None if group is None else group.post_forward_mesh_info for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield Unsharded(model)
    finally:
        reshard(modules)
        for group, info in zip(groups, kept, strict=True):
            if group is not None:
                group.post_forward_mesh_info = info


def _free(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: those that PyTorch has kept from tensors that are gone are, too."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places, the longest first, in batches."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    return [order[begin : begin + BATCH_SIZE] for begin in range(0, len(order), BATCH_SIZE)]


def _in_memory(batch: list[int], run: Callable[[list[int]], Sequence[Result]]) -> Iterator[tuple[int, Result]]:
    """Places, and what ``run`` gives for each: of the halves of a batch, one after the other, where a GPU has no room for all."""
    found: Sequence[Result] | None = None
    try:
        found = run(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    if found is None:  # outside of the handler, which holds what was allocated
        half = len(batch) // 2
        yield from _in_memory(batch[:half], run)
        yield from _in_memory(batch[half:], run)
    else:
        yield from zip(batch, found, strict=True)


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    task: TaskConfig,
    stops: Sequence[int],
    beat: Callable[[], None],
) -> list[list[int]]:
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = stops[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if task.temperature:
        sampling = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p, "top_k": 0}
    own = model.generation_config
    model.generation_config = GenerationConfig()  # a model's own defaults are not asked for
    try:
        with evaluating(model), _any_kernels():
            output = model.generate(
                ids,
                GenerationConfig(
                    max_new_tokens=task.max_new_tokens,
                    eos_token_id=list(stops),
                    pad_token_id=pad,
                    use_cache=True,
                    **sampling,
                ),
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList([_Beat(beat)]),
                synced_gpus=False,
            )
    finally:
        model.generation_config = own
    assert isinstance(output, Tensor)
    found: list[list[int]] = output[:, width:].tolist()
    return found


@contextlib.contextmanager
def _any_kernels() -> Iterator[None]:
    """Where deterministic kernels are demanded, an operation that has none warns: the sums of ``top_p`` have none on GPUs."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))  # 0 demands none, 1 warns, 2 raises
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class _Beat(StoppingCriteria):
    """Stops nothing."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._beat()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
