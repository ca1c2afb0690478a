"""Activations that lie on the host from a layer's forward to its backward.

    forward     what autograd saves: the storage of each tensor is copied to the host, once, of however many tensors it is
    backward    the first tensor that is asked for brings its storage back, with the last one it is freed

Tensors come back with their strides and share storages as before, so that kernels compute the same to the bit and what q, k and v
are computed of travels once; torch's ``save_on_cpu`` copies every tensor by itself, contiguous, and parameters, too. Those stay
where they are, as FSDP frees and gathers them, and so do a layer's arguments but the first: masks and rotary positions, which all
layers are given. Of a layer that is recomputed, that first argument is all that autograd saves.

Copies run on the current stream: the processor does not wait for them, other kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves


def offloaded(compute: Callable[..., Any], layer: Callable[..., Any], hidden: Any, *others: Any, **named: Any) -> Any:
    """``compute(layer, hidden, *others, **named)``, whose activations lie on the host until their backward.

    Args:
        layer: the forward of a layer; if it is a ``partial``, its keywords are arguments of the layer, too.
    """
    given = tree_leaves((others, named, getattr(layer, "keywords", {})))
    shared = {tensor.untyped_storage() for tensor in given if _is_plain(tensor)}
    copies: WeakKeyDictionary[torch.UntypedStorage, dict[Any, _Copy]] = WeakKeyDictionary()

    def pack(tensor: Tensor) -> Tensor | _Packed:
        base = tensor._base if tensor._is_view() else tensor
        if isinstance(base, nn.Parameter) or not _is_plain(tensor) or tensor.untyped_storage() in shared:
            return tensor.detach()  # an output would hold the node that holds it
        of_storage = copies.setdefault(tensor.untyped_storage(), {})
        held = tensor.dtype, tensor._version
        if held not in of_storage:
            of_storage[held] = _Copy(tensor)
        return _Packed(of_storage[held], tensor.size(), tensor.stride(), tensor.storage_offset())

    with saved_tensors_hooks(pack, _unpack):
        return compute(layer, hidden, *others, **named)


def to_host(storage: Tensor) -> Tensor:
    """A copy of ``storage [n]`` on the host, which a GPU has made when its stream comes to it."""
    held = torch.empty(storage.shape, dtype=storage.dtype, device="cpu", pin_memory=storage.is_cuda)
    return held.copy_(storage, non_blocking=True)


class _Copy:
    """The storage of a tensor: on the host, and from its first use in backward on its device."""

    def __init__(self, tensor: Tensor) -> None:
        entries = tensor.untyped_storage().nbytes() // tensor.itemsize
        self._device = tensor.device
        self._held: Tensor | None = to_host(tensor.detach().as_strided((entries,), (1,), 0))
        self._back: Tensor | None = None

    def back(self) -> Tensor:
        if self._held is not None:
            self._back = torch.empty_like(self._held, device=self._device).copy_(self._held, non_blocking=True)
            self._held = None
        assert self._back is not None
        return self._back


class _Packed(NamedTuple):
    copy: _Copy
    size: torch.Size
    stride: tuple[Any, ...]
    offset: Any


def _unpack(packed: Tensor | _Packed) -> Tensor:
    return packed.copy.back().as_strided(*packed[1:]) if isinstance(packed, _Packed) else packed


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor whose storage tells what it holds."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_conj() or value.is_neg())
