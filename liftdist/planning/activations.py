"""Bytes of activations, of the real model run on fake tensors, which have shapes but no memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import moe

from liftdist.errors import UserError
from liftdist.models import build, recompute
from liftdist.models.head import in_chunks
from liftdist.planning.live_bytes import LiveBytes
from liftdist.registry import LOSSES, METHODS
from liftdist.schema import Config


class Activations(NamedTuple):
    """Bytes of activations of a micro-batch."""

    fixed: int  # independent of the number of layers
    layer: int  # per layer, from its forward to its backward
    loss: int  # in addition, while the loss is computed
    backward: int  # in addition, while one layer's backward runs, with the gradients of its weights
    after: int = 0  # in addition, when that has ended: below zero, as what the layer kept is freed
    on_host: int = 0  # per layer, on the host
    spared: int = 0  # of what a layer keeps, in each that is recomputed while others are not
    spared_on_host: int = 0


def activations(hf_config: Any, config: Config, rows: int) -> Activations:
    """Activations of ``rows`` sequences: runs the real model with one and two layers, forward and backward, on fake tensors.

    Where some layers are recomputed, both kinds are run; the last one recomputed has its backward when those after it are freed.
    """
    every = config.model.recomputed_every
    if every <= 1:
        return _of_layers_alike(hf_config, config, rows)
    kept, less = (
        _of_layers_alike(
            hf_config,
            dataclasses.replace(config, model=dataclasses.replace(config.model, activation_checkpointing=recomputed)),
            rows,
        )
        for recomputed in (False, True)
    )
    freed = (hf_config.get_text_config(decoder=True).num_hidden_layers - 1) % every * kept.layer
    return kept._replace(
        backward=max(kept.backward, less.backward - freed),
        after=max(kept.after, less.after - freed),
        spared=kept.layer - less.layer,
        spared_on_host=kept.on_host - less.on_host,
    )


def _of_layers_alike(hf_config: Any, config: Config, rows: int) -> Activations:
    loss = LOSSES.load(config.train.loss).make(config.train)
    kept, sent, losses, backwards, after = [], [], [], [], 0
    for layers in (1, 2):
        live, ended = LiveBytes(), list[int]()
        packed, grouped, placed = packing_known(config.data.packing), grouped_products_known(), places_known(config)
        model = build.build(_with_layers(hf_config, layers), config.model)
        trained = _trained(model, config)
        with FakeTensorMode(allow_non_fake_inputs=True), packed, grouped, placed, live:
            model.to_empty(device="cpu").train()
            model.tie_weights()  # which it has put apart
            recompute.keep(model, config.model)
            decoder_layers = build.decoder_layers(model)
            for module in decoder_layers:
                _drop_gradients(module, functools.partial(_note, live, ended))
            of_layers = {param for module in decoder_layers for param in module.parameters()}
            for name, param in model.named_parameters():
                param.requires_grad_(name in trained)
                if param.requires_grad and param not in of_layers:
                    param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
            shape = (rows, config.data.max_length)
            tokens = torch.zeros(shape, dtype=torch.int64)
            before = live.peak = live.now
            in_chunks(model)
            places = torch.arange(shape[1])
            with torch.no_grad():
                base = model.hidden_at(tokens, None, places) if loss.needs_base else None
            total = model.chunked_loss(tokens, None, places, tokens, loss.per_token, base=base)
            kept.append(live.now - before)
            sent.append(live.offloaded)
            losses.append(live.peak - live.now)
            live.peak = live.now
            total.backward()
            backwards.append(live.peak - before - kept[-1])
            after = ended[0] - before - kept[-1] if ended else 0
    layer = kept[1] - kept[0]
    return Activations(kept[0] - layer, layer, losses[1], backwards[1], after, sent[1] - sent[0])


def _note(live: LiveBytes, ended: list[int]) -> None:
    ended.append(live.now)


def _drop_gradients(layer: nn.Module, dropped: Callable[[], None]) -> None:
    """Drop the gradients of a layer's weights when its backward ends, as FSDP does, and not one by one; then call ``dropped``."""

    def drop(_: torch.Tensor) -> None:
        for param in layer.parameters():
            param.grad = None
        dropped()

    def watch(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for tensor in (*arguments, *keywords.values()):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(drop)

    layer.register_forward_pre_hook(watch, with_kwargs=True)


def _trained(model: PreTrainedModel, config: Config) -> set[str]:
    """The names of the parameters that are trained, after adding to the model what is not in its files."""
    method = METHODS.load(config.method)
    try:
        method.extend(config, model)
        found = method.places(config, model)
    except UserError:  # the patterns match later layers only
        every = dataclasses.replace(config.selection, modules=["*"])
        adapted = dataclasses.replace(config.lora, modules=[])
        return _trained(model, dataclasses.replace(config, selection=every, lora=adapted))
    return {place.parameter for place in found.values()}


def packing_known(packing: bool) -> contextlib.AbstractContextManager:
    """Tell transformers whether samples are packed: on fake tensors it assumes so, and builds a mask of all token pairs."""
    if packing:
        return contextlib.nullcontext()
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)


def grouped_products_known() -> contextlib.AbstractContextManager:
    """Let experts compute by transformers' own operation: on fake tensors torch's grouped product takes bf16 alone."""
    own = moe._can_use_grouped_mm
    return mock.patch.object(
        moe, "_can_use_grouped_mm", lambda *tensors: tensors[1].dtype == torch.bfloat16 and own(*tensors)
    )


def places_known(config: Config) -> contextlib.AbstractContextManager:
    """Let SHiRA's values be put into a dense matrix: a sparse one has no gradient on fake tensors."""
    if config.method != "lora" or config.lora.variant != "shira":
        return contextlib.nullcontext()
    from peft.tuners.shira.layer import Linear

    def delta(layer: Any, adapter: str) -> torch.Tensor:
        values = layer.shira_weight[adapter]
        places = torch.empty(2, len(values), dtype=torch.int64)
        return values.new_zeros(layer.out_features, layer.in_features).index_put(tuple(places), values)

    return mock.patch.object(Linear, "get_delta_weight", delta)


#: Settings that make the first layers of a model with experts dense.
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def _with_layers(hf_config: Any, layers: int) -> Any:
    """The configuration with its last layers, with experts if the model has any."""
    shallow = copy.deepcopy(hf_config)
    text = shallow.get_text_config(decoder=True)
    for key, value in vars(text).items():  # the kinds of layers
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[-layers:])
    for key in DENSE_FIRST:
        if getattr(text, key, None):
            setattr(text, key, 0)
    text.num_hidden_layers = layers
    return shallow
