"""Whether a model keeps the samples of a packed sequence apart: tried out before the first step, by the forward of training.

    packed    [S0 S1 S2 S3]
    changed   [S0 T1 S2 T3]    lengths are those of ``packed``
    alone     [S0], [S2]       S2 is as long as sequences may be, which shows what reaches far: windows, blocks, searches
    longer    [S2 and more]    one sample, as long as ``packed``

Without a leak, the outputs at S2 are the same in all, but for rounding:

    |packed - changed| at S2  =   0    S2 does not depend on S1: equal shapes are rounded alike, ...
                              <=  4 |packed - packed again| + slack        ... unless kernels add in no fixed order
                              <=  4 |packed - changed| at S0 + slack       ... or tokens that share an expert differ
    |packed - alone|   at S2  <=  4 |packed - alone|   at S0 + slack       positions and windows are those of S2 alone, ...
                              or  4 |longer - alone|   at S2 + slack       ... unless a long sample is rounded otherwise

No other sample precedes S0, nor S2 in ``longer``: what moves them is rounding. The slack is 2 eps of the dtype, or 1e-5; S0
itself is bounded, too.

Most models separate samples by positions that restart. One that does not is given transformers' mask for packed sequences, then
also what kernels of recurrent layers take. If nothing helps, the run is refused.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from liftdist.data.batches import pack, to_device
from liftdist.data.tokenised import IGNORED
from liftdist.distributed import collectives
from liftdist.errors import UserError
from liftdist.models.build import computing_dtype
from liftdist.models.head import probing
from liftdist.training import objective

OPENING, BETWEEN = 24, (7, 5)  # tokens of S0, and of S1 and S3
FIRST = 8  # tokens of S2 that a convolution reaches at least
LABELS, COLUMNS = 128, 1024  # places in S2 besides its first, and logits of each, that are compared
ROUNDING = 4.0  # the factor of the bounds
NOT_CAUSAL = 0.2  # rounding moves outputs by less
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")

Row = dict[str, list[list[int]]]  # input_ids and labels of the samples of a sequence


def keep_apart(model: PreTrainedModel, device: torch.device, max_length: int, rows: int) -> None:
    """Make :func:`liftdist.training.objective.token_losses` keep packed samples apart. Collective.

    Args:
        max_length: tokens of the longest sequence that will be trained on.
        rows: sequences of a micro-batch; two of them are tried at most.

    Raises:
        UserError: neither positions, nor a mask, nor kernels separate them.
    """
    remedy = "set data.packing=false"
    if not (problem := _first(_mixed(model, device, max_length, rows))):
        return
    # a mask may undo a window, which only a longer sample shows
    ways = (masks, masks_and_bounds) if _window(model, max_length) < _lengths(max_length)[1] else ()
    for way in ways:
        model.separating = functools.partial(way, model)
        try:
            mixed = _mixed(model, device, max_length, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model makes of arguments that it does not take
            mixed = str(error) or "error"
            if "packed sequences" in mixed:  # transformers lacks a kernel
                remedy = f"{remedy}, or: {mixed.splitlines()[0]}"
        if not _first(mixed):
            return
        del model.separating
    raise UserError(
        f"data.packing=true: {type(model).__name__.removeprefix('FSDP')} does not keep packed samples apart: {problem}; {remedy}"
    )


def _first(problem: str) -> str:
    """The first problem of any rank. Collective."""
    return next(filter(None, collectives.gather(problem)), "")


def masks(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """The mask of packed samples ``[B, 1, L, L]``, by type of layer where these differ; ``{}`` if no sequence is packed.

    For models that give their attention the ``attention_mask`` that they are given, but build their own without
    ``position_ids [B, L]``.
    """
    if not (position_ids[:, 1:] == 0).any():
        return {}
    shaped = torch.empty((*position_ids.shape, 0), dtype=computing_dtype(model), device=position_ids.device)
    return {"attention_mask": create_masks_for_generate(model.config, shaped, None, None, position_ids)}


def masks_and_bounds(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """In addition the bounds and the numbers of the samples, which kernels of recurrent layers and flash attention take."""
    if not (arguments := masks(model, position_ids)):
        return {}
    starts = position_ids == 0
    bounds = F.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=position_ids.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return arguments | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": (starts.cumsum(1) - 1).to(torch.int32),
    }


def _window(model: PreTrainedModel, max_length: int) -> int:
    """The longest attention window that cuts sequences of ``max_length`` tokens, or 0."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in WINDOWS]
    return max((window for window in windows if isinstance(window, int) and window < max_length), default=0)


def _lengths(max_length: int) -> tuple[int, int]:
    """Tokens of S0 and S2."""
    first = max(2, min(OPENING, (max_length - sum(BETWEEN)) // 2))
    return first, max(2, max_length - sum(BETWEEN) - first)


def _mixed(model: PreTrainedModel, device: torch.device, max_length: int, rows: int) -> str:
    """What shows that packed samples mix, or an empty text. Collective."""
    packed, changed, longer, *alone = _sequences(model, max_length, min(rows, 2))
    with probing(model):
        reference, again, other, third_longer, first_alone, third_alone = (
            _logits(model, sequences, device) for sequences in (packed, packed, changed, longer, *alone)
        )
    counts = [_labels(row) for pair in zip(*alone, strict=True) for row in pair]
    (first, third), (first_changed, third_changed) = (
        (found.split(counts)[::2], found.split(counts)[1::2]) for found in (reference, other)
    )
    slack = max(2 * torch.finfo(computing_dtype(model)).eps, 1e-5)
    noise = _distance(first, first_changed)
    leak = max(_distance(third, third_changed), _distance(third, third_changed, FIRST))
    rounding, moved = (
        _distance(packed_in, single.split([len(sample) for sample in packed_in]))
        for packed_in, single in ((first, first_alone), (third, third_alone))
    )
    rounding = max(rounding, _distance([third_longer], [third_alone]))
    jitter = _distance([reference], [again])
    if not math.isfinite(noise + leak + rounding + moved + jitter):
        return "its outputs are not finite"
    if any("expert" in name or "moe" in name for name, _ in model.named_modules()):
        # which tokens share an expert decides how they are rounded
        most_noise, most_leak = min(NOT_CAUSAL, 10 * slack), ROUNDING * noise + slack
    else:  # equal shapes are rounded alike, but for kernels that add in no fixed order
        most_noise = most_leak = ROUNDING * jitter + slack if jitter else 0.0
    if noise > most_noise:
        return f"the outputs of a sample change by {100 * noise:.3g}% with those after it"
    if leak > most_leak:
        return f"the outputs of a sample change by {100 * leak:.3g}% with the one before it"
    if rounding > NOT_CAUSAL or moved > ROUNDING * rounding + slack:
        return f"the outputs of a sample are by {100 * max(rounding, moved):.3g}% not those of the sample by itself"
    return ""


def _sequences(model: PreTrainedModel, max_length: int, rows: int) -> tuple[list[Row], ...]:
    """``packed``, ``changed``, ``longer``, S0 alone and S2 alone; only S0 and S2 are labelled."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    openings = itertools.count(vocabulary // 8)
    lengths = _lengths(max_length)
    every = 1 + lengths[1] // LABELS

    def sample(length: int, labelled: bool) -> tuple[list[int], list[int]]:
        # ordinary tokens: special ones, those of bytes and images stand elsewhere
        ids = torch.randint(vocabulary // 8, vocabulary // 2, (length,), generator=generator).tolist()
        ids[0] = next(openings)  # no two samples begin alike
        wanted = [labelled and (place < OPENING or place % every == 0) for place in range(length)]
        return ids, [token if label else IGNORED for token, label in zip(ids, wanted, strict=True)]

    def row(*samples: tuple[list[int], list[int]]) -> Row:
        return {"input_ids": [ids for ids, _ in samples], "labels": [labels for _, labels in samples]}

    packed, changed, longer, firsts, thirds = [], [], [], [], []
    for index in range(rows):  # the second is shorter, and padded
        first, third = (sample(max(2, length - 3 * index), True) for length in lengths)
        packed.append(row(first, sample(BETWEEN[0], False), third, sample(BETWEEN[1], False)))
        changed.append(row(first, sample(BETWEEN[0], False), third, sample(BETWEEN[1], False)))
        more = sample(sum(BETWEEN) + len(first[0]), False)
        longer.append(row(([*third[0], *more[0]], [*third[1], *more[1]])))
        firsts.append(row(first))
        thirds.append(row(third))
    return packed, changed, longer, firsts, thirds


def _labels(row: Row) -> int:
    """Labelled places of a row of one sample."""
    return sum(label != IGNORED for label in row["labels"][0][1:])


def _logits(model: PreTrainedModel, sequences: list[Row], device: torch.device) -> Tensor:
    """Some logits of all labelled tokens, by sequence, ``[labels, columns]`` float32, as the loss gets them."""
    found: list[Tensor] = []

    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        found.append(logits[labels != IGNORED, :: max(1, logits.shape[1] // COLUMNS)].float())
        return logits.new_zeros(len(labels), dtype=torch.float32)

    objective.token_losses(model, to_device(pack(sequences), device), keep)
    return torch.cat(found)


def _distance(some: Sequence[Tensor], others: Sequence[Tensor], tokens: int | None = None) -> float:
    """How far the logits of samples are apart, relative to their spread; of the first ``tokens`` of each only, if given."""
    a, b = (torch.cat([sample[:tokens] for sample in samples]) for samples in (some, others))
    return float((a - b).norm() / (b - b.mean(1, keepdim=True)).norm())
