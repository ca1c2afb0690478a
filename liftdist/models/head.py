"""The output head of a causal language model, and a loss over it that never holds all logits at once.

    L = sum over labelled tokens t of  w_t loss(W h_t, y_t)     W [vocabulary, d] the output head

Tokens are processed in chunks. ``dL/dh_t``, and ``dL/dW`` if ``W`` is trained, are all that backward needs: they are computed
right after a chunk's logits, in forward, without recomputation; ``dL/dW`` is summed over the chunks in float32. A loss that
compares with the base model is given its logits too, chunk by chunk: they are ``W`` times the hidden states of the base model,
kept for the labelled positions.

Some models also scale or cap their logits: :func:`is_plain` compares both ways on a few tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from liftdist.engine.decoder import text_decoder
from liftdist.errors import UserError
from liftdist.models.build import class_name, computing_dtype

CHUNK_LOGITS = 2**25  # logits per chunk; about 14 B of memory for each

#: logits [T, V], labels [T] -> [T] float32, the loss of each token, zero where there is no label. One that compares with the base
#: model takes the base model's logits [T, V] as a third argument.
PerToken = Callable[..., Tensor]


@dataclass(frozen=True)
class Terms:
    """What becomes of the losses of ``T`` tokens: their weights, and the parts whose sums are wanted besides the sum of all."""

    weights: Tensor | None = None  # [T] float32; None: all are 1
    parts: Tensor | None = None  # [T] int64, the part that each token is of
    sums: Tensor | None = None  # [parts] float64, to which the sums are added

    def add(self, losses: Tensor, chunk: slice = slice(None)) -> Tensor:
        """The sum of the losses ``[t]`` of the tokens in ``chunk``, each times its weight. Float32 ``[]``."""
        if self.weights is not None:
            losses = losses * self.weights[chunk]
        if self.parts is not None and self.sums is not None:
            self.sums.index_add_(0, self.parts[chunk], losses.detach().double())
        return losses.sum()


class ChunkedLoss(torch.autograd.Function):
    """``(hidden [T, d], head [V, d], labels [T], loss, terms, base [T, d]) -> []`` float32, summed.

    ``hidden`` gets a gradient, and ``head`` if it is trained.

    ``base``: hidden states of the base model, for a loss that compares with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        loss: PerToken,
        terms: Terms = Terms(),
        base: Tensor | None = None,
    ) -> Tensor:
        tokens = max(1, CHUNK_LOGITS // head.shape[0])
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], tokens):
            chunk = slice(begin, begin + tokens)
            others = () if base is None else (F.linear(base[chunk], head),)
            part = hidden[chunk].detach().requires_grad_(gradient is not None)
            weight = head.detach().requires_grad_(of_head is not None)
            wanted = [tensor for tensor in (part, weight) if tensor.requires_grad]
            with torch.set_grad_enabled(bool(wanted)):
                summed = terms.add(loss(F.linear(part, weight), labels[chunk], *others), chunk)
            found = list(torch.autograd.grad(summed, wanted)) if wanted else []
            if of_head is not None:
                of_head += found.pop()
            if gradient is not None:
                gradient[chunk] = found.pop()
            total += summed.detach()
        ctx.save_for_backward(gradient, of_head)
        ctx.dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        gradient, of_head = ctx.saved_tensors
        if gradient is not None:
            gradient = (gradient.float() * outer[0]).to(gradient.dtype)
        if of_head is not None:
            of_head = of_head.mul_(outer[0]).to(ctx.dtype)
        return gradient, of_head, None, None, None, None


def in_chunks(model: PreTrainedModel) -> None:
    """Add ``chunked_loss`` and ``hidden_at``, see the functions below, to a model for which :func:`is_plain` holds."""
    for name, function in (("chunked_loss", _chunked_loss), ("hidden_at", _hidden_at)):
        setattr(model, name, types.MethodType(function, model))
        register_fsdp_forward_method(model, name)  # if it is sharded, FSDP gathers the head for the call


def _chunked_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    places: Tensor,
    labels: Tensor,
    loss: PerToken,
    terms: Terms = Terms(),
    base: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """The summed loss at ``places [P]`` of sequences ``[B, L]``; ``labels [B, P]``, ``terms`` of ``B P``. Float32 ``[]``.

    ``base`` is what :func:`_hidden_at` gave of the base model; ``others`` are arguments of the decoder.
    """
    chosen = _hidden_at(model, input_ids, position_ids, places, **others)
    return ChunkedLoss.apply(chosen, model.get_output_embeddings().weight, labels.flatten(), loss, terms, base)


def _hidden_at(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, places: Tensor, **others: Any
) -> Tensor:
    """The last hidden states at ``places [P]`` of sequences ``[B, L]``: ``[B P, d]`` in the dtype of the head."""
    decoder = text_decoder(model)
    hidden = decoder(**text_inputs(decoder, model.config, input_ids, position_ids), **others).last_hidden_state
    return hidden[:, places].flatten(0, 1).to(model.get_output_embeddings().weight.dtype)


def text_inputs(
    module: nn.Module, config: Any, input_ids: Tensor, position_ids: Tensor | None = None
) -> dict[str, Any]:
    """What ``module``, a model or its decoder, takes for a text; ``input_ids`` and ``position_ids`` ``[B, L]``."""
    accepted = inspect.signature(module.forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if "position_ids" in accepted and position_ids is not None:
        rotary = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
        if axes := len(
            rotary.get("mrope_section") or ()
        ):  # text has equal positions on all axes; first, those that masks use
            position_ids = position_ids.expand(1 + axes, *position_ids.shape)
        inputs["position_ids"] = position_ids
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = torch.zeros_like(input_ids)
    return inputs


def is_plain(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the logits are exactly ``W h_t``, as the chunked loss assumes; compared on a few tokens. Collective.

    Raises:
        UserError: the logits of a token depend on later ones.
    """
    tokens = torch.arange(1, 9, device=device).repeat(2, 1)
    tokens[1, -1] = 1
    positions = torch.arange(8, device=device).repeat(2, 1)
    model.plain_logits = types.MethodType(_plain_logits, model)
    register_fsdp_forward_method(model, "plain_logits")
    with probing(model):
        logits = model(**text_inputs(model, model.config, tokens, positions)).logits
        plain = model.plain_logits(tokens, positions)
    del model.plain_logits
    first, second = logits[:, :-1].float()
    rounding = max(1e-4, 4 * torch.finfo(computing_dtype(model)).eps)  # which experts' batches may differ by
    if (first - second).abs().max() > rounding * first.abs().max():
        hint = ": set is_decoder to true in config.json" if getattr(model.config, "is_decoder", None) is False else ""
        raise UserError(
            f"{class_name(model)}: its predictions depend on later tokens; only causal models can be trained{hint}"
        )
    return plain is not None and torch.equal(plain.float(), logits.float())


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """For forwards of a few tokens: as :func:`evaluating`; a model that is to be compiled is not compiled for them."""
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """For forwards without dropout and gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _plain_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
    head, decoder = model.get_output_embeddings(), text_decoder(model)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    output = decoder(**text_inputs(decoder, model.config, input_ids, position_ids))
    hidden = getattr(output, "last_hidden_state", None)
    return (
        None
        if hidden is None or hidden.shape[-1] != head.in_features
        else F.linear(hidden.to(head.weight.dtype), head.weight)
    )
