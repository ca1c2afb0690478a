"""Bytes by collective and mesh axis."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

#: what operations are called, by what their operators' names begin with
OPERATIONS = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes a rank puts into them, by process group: ``{group: {operation: [calls, bytes]}}``."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group: dict[str, dict[str, list[int]]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            group = next(a for a in arguments if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            name = dist.ProcessGroup.unbox(group).group_name
            operation = function.__name__.split(".")[0].strip("_").removesuffix("_")
            sent = arguments[1] if operation in ("reduce_scatter_base", "allgather_base") else arguments[0]
            operation = next((known for start, known in OPERATIONS.items() if operation.startswith(start)), operation)
            tensors = sent if isinstance(sent, list | tuple) else [sent]
            entry = self.by_group.setdefault(name, {}).setdefault(operation, [0, 0])
            entry[0] += 1
            entry[1] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return function(*arguments, **(keywords or {}))
