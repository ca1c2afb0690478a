"""Where the changed weights of a delta lie in a model that vLLM has loaded, and how they are exchanged there.

    found by vLLM's own loader:  model.load_weights([(NAME, staged)])
        staged  [m, n] the tensor of the checkpoint: NaN, but for the changed weights
        Each copy into the model is caught before it is carried out. What of it is not NaN is recorded: where, and the value.
    exchanged:                   storage[index] = values, where storage[index] was base          and back, both to the bit

Names, packed projections, and the share of a rank are thus the loader's business; it is asked twice, for values and for base
values, as it may change both. Contract of a loader: the last step is a copy of equal shape. vLLM's own sparse updates ask for the
same (``model_executor/model_loader/checkpoint_weight_patch.py``). Any other way to write is refused, before it writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liftdist.deltas.delta import Change, Delta, bits, changed, is_plain, loses
from liftdist.errors import UserError

_STAGED = 64 << 20  # bytes of tensors that are staged at once; a single one may be larger
_ELSEWISE = (
    "the engine keeps these weights in another form than the checkpoint, as quantised or packed ones; serve the merged model: "
    "`liftdist export --format hf`, or `liftdist apply --output`"
)


@dataclass(frozen=True)
class Count:
    """How many of some tensors' changed weights a rank's share holds."""

    names: str  # of the tensors: the first and the last
    placed: int
    weights: int  # that the whole delta changes


@dataclass(frozen=True)
class Placed:
    """The changed weights of a delta in one storage of the model."""

    storage: Tensor  # [all] all of it, in the engine's dtype
    index: Tensor  # [k] int32 or int64, on the host
    base: Tensor  # [k] in the engine's dtype, on the host
    values: Tensor  # [k] likewise


def place(model: nn.Module, delta: Delta) -> tuple[list[Placed], list[Count]]:
    """The part of a delta that this rank's share of a model holds, and how many weights that is, by groups of tensors.

    Raises:
        UserError: the loader knows a tensor not, or not with this shape; or keeps it in another form, or in a dtype in which new
            values are rounded.
    """
    found: dict[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    counts = []
    for chunk in _chunks(delta):
        base, values = _copies(model, delta, chunk, "base"), _copies(model, delta, chunk, "values")
        if [index.shape for _, index, _ in base] != [index.shape for _, index, _ in values]:
            raise UserError(f"{delta.location}: {_range(chunk)}: {_ELSEWISE}")
        for (target, index, old), (_, _, new) in zip(base, values, strict=True):
            if loses(new, target.dtype):
                raise UserError(f"{delta.location}: {_range(chunk)}: {rounded(target.dtype, new.dtype)}")
            if index.numel():
                own = (target, index, old.to(target.dtype), new.to(target.dtype))
                found.setdefault(target.untyped_storage().data_ptr(), []).append(own)
        held = sum(index.numel() for _, index, _ in base)
        counts.append(Count(_range(chunk), held, sum(change.indices.numel() for _, change in chunk)))
    placed = []
    for copies in found.values():
        target = copies[0][0]
        storage = torch.empty(0, dtype=target.dtype, device=target.device).set_(target.untyped_storage())
        index, old, new = (torch.cat([copy[part] for copy in copies]) for part in (1, 2, 3))
        placed.append(Placed(storage, index.to(torch.int32 if storage.numel() < 2**31 else torch.int64), old, new))
    return placed, counts


def rounded(dtype: torch.dtype, values: torch.dtype) -> str:
    """Says that an engine holds weights in a dtype in which new values are rounded."""
    return (
        f"the engine's {dtype} does not hold the delta's values of {values}, and would undo most changes by rounding; start "
        "vLLM with --dtype float32"
    )


def check_found(path: str, shares: Sequence[Sequence[Count]]) -> int:
    """The number of weights that a delta changes, if some rank has each.

    A sum over all tensors would not tell: what is held by several ranks, such as norms, could make up for what none holds. It is
    taken over each group of tensors, 64 MiB or a single one.

    Args:
        shares: of the ranks, as :func:`place` gives them.

    Raises:
        UserError: the ranks together hold fewer weights of some tensors than the delta changes.
    """
    for ranks in zip(*shares, strict=True):
        placed, group = sum(one.placed for one in ranks), ranks[0]
        if placed < group.weights:
            raise UserError(
                f"{path}: {group.names}: vLLM's loader places {placed} of {group.weights} weights; serve the merged model"
            )
    return sum(one.weights for one in shares[0])


def holds(placed: Sequence[Placed], part: str) -> bool:
    """Whether the model holds these weights to the bit: ``base`` or ``values``."""
    return all(
        torch.equal(
            bits(one.storage[one.index.to(one.storage.device)]), bits(getattr(one, part).to(one.storage.device))
        )
        for one in placed
    )


def write(placed: Sequence[Placed], part: str) -> None:
    """Make the model hold these weights: ``base`` or ``values``."""
    with torch.no_grad():
        for one in placed:
            one.storage[one.index.to(one.storage.device)] = getattr(one, part).to(one.storage.device)


def check_in_use(model: nn.Module, placed: Sequence[Placed]) -> None:
    """Raises ``UserError`` if the model has been given other storages since."""
    storages = _storages(model)
    if any(one.storage.untyped_storage().data_ptr() not in storages for one in placed):
        raise UserError("the engine has replaced its weights since the delta was loaded; restart it")


def _chunks(delta: Delta) -> Iterator[list[tuple[str, Change]]]:
    chunk: list[tuple[str, Change]] = []
    size = 0
    for name, change in changed(delta):
        if change.base is None:
            raise UserError(
                f"{delta.location}: holds no base values, by which it is undone; make it without --without-base"
            )
        if not is_plain(change.dtype) or change.base.isnan().any():
            raise UserError(f"{delta.location}: {name}: {_ELSEWISE}")
        staged = int(torch.Size(change.shape).numel()) * change.values.element_size()
        if chunk and size + staged > _STAGED:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, change))
        size += staged
    if chunk:
        yield chunk


def _copies(
    model: nn.Module, delta: Delta, chunk: list[tuple[str, Change]], part: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the loader would write of values or base values: into which tensor, at which index of its storage, what, before it is
    rounded to that tensor's dtype."""

    def staged(change: Change) -> Tensor:
        values = getattr(change, part)
        tensor = torch.full((int(torch.Size(change.shape).numel()),), float("nan"), dtype=values.dtype)
        tensor[change.indices] = values
        return tensor.view(change.shape)

    weights = [(name, staged(change)) for name, change in chunk]
    try:
        with torch.no_grad(), _Copies(_storages(model)) as caught:
            model.load_weights(weights)  # type: ignore[operator]
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{delta.location}: {_range(chunk)}: vLLM's loader: {told:.200}: {_ELSEWISE}") from error
    return caught.found


def _range(chunk: list[tuple[str, Change]]) -> str:
    return chunk[0][0] if len(chunk) == 1 else f"{chunk[0][0]} to {chunk[-1][0]}"


def _storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {pointer for tensor in tensors if (pointer := tensor.untyped_storage().data_ptr())}


class _Copies(TorchDispatchMode):
    """Catches copies into some storages, which are not carried out; ``NotImplementedError`` for other ways to write there."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()
        self._storages = storages
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = [
            tensor
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(given.get(argument.name))
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._storages
        ]
        if not written:
            return func(*args, **(kwargs or {}))
        target, source = args[0], args[1:2]
        is_copy = func is torch.ops.aten.copy_.default
        if not (is_copy and source[0].shape == target.shape and source[0].is_floating_point()):
            raise NotImplementedError(f"it writes by {func}, not by a copy of equal shape")
        flat = source[0].flatten()
        at = flat.isnan().logical_not_().nonzero()[:, 0]
        index = torch.zeros_like(at) + target.storage_offset()
        for places, stride in zip(torch.unravel_index(at, target.shape), target.stride(), strict=True):
            index += places * stride
        self.found.append((target, index.cpu(), flat[at].cpu()))
        return target
