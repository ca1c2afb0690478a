"""Bytes of live tensors, real or fake, on any device: what a run needs, without what an allocator caches.

Activations that lie on the host (``model.offload_activations``) are counted apart, also where the device is the host.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from liftdist.distributed.sharding import local_tensor
from liftdist.engine import quantised
from liftdist.models import offload


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return inside ``with``, while they are alive.

    Tensors that existed before are counted only if they are passed to :meth:`add`.

    Attributes:
        offloaded: bytes of activations on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.offloaded = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}  # by address
        self._patches = contextlib.ExitStack()
        self._is_elsewhere = False  # what is made now

    def add(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed."""
        held = quantised.held_by(tensor)
        storage = (local_tensor(tensor) if held is None else held.buffer).untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key][0]() is storage:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
        self._grow(size)

    def _freed(self, key: int) -> None:
        self._grow(-self._known.pop(key)[1])

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __enter__(self) -> LiveBytes:
        resize, to_host = torch.UntypedStorage.resize_, offload.to_host

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP frees gathered parameters by resizing
            result = resize(storage, size)
            known = self._known.get(storage._cdata)
            if known is not None:
                self._known[storage._cdata] = (known[0], size)
                self._grow(size - known[1])
            return result

        def sent(storage: Tensor) -> Tensor:
            self._is_elsewhere = True
            held = to_host(storage)
            self._is_elsewhere = False
            self._send(held.nbytes)
            weakref.finalize(held.untyped_storage(), self._send, -held.nbytes)
            return held

        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        self._patches.enter_context(mock.patch.object(offload, "to_host", sent))
        super().__enter__()
        return self

    def _send(self, size: int) -> None:
        self.offloaded += size

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in () if self._is_elsewhere else tree_iter(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result
