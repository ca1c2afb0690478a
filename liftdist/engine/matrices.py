"""The trained matrices of a model: which they are, and how they are sharded.

every ``nn.Linear`` whose name matches, except the output head  W [m, n]
plain, or sharded by rows with FSDP2                            W_local [m_local, n], rows row_bounds[s] to row_bounds[s + 1]
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from liftdist.distributed.collectives import Group
from liftdist.distributed.sharding import local_tensor, row_bounds
from liftdist.errors import UserError


def principal_parameters(model: nn.Module, patterns: Sequence[str] = ("*",)) -> dict[str, nn.Parameter]:
    """Weights to train by name: every ``nn.Linear`` whose name matches a pattern, except the output head.

    Raises:
        UserError: no module matches.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    names = {id(param): name for name, param in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and any(fnmatch.fnmatchcase(name, p) for p in patterns):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found[names[id(weight)]] = weight
    if not found:
        linear = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
        ]
        example = f"; one module is named {linear[0]}" if linear else ""
        raise UserError(f"no linear module fits {', '.join(patterns)}{example}")
    return found


@dataclass(frozen=True)
class Matrix:
    """A trained matrix and this rank's part of it. All access to its memory goes through this class."""

    name: str
    param: nn.Parameter  # plain [m, n], or DTensor of [m, n] sharded by rows
    row_bounds: tuple[int, ...]  # [shards + 1] shard s holds rows row_bounds[s] to row_bounds[s + 1]
    shard: int  # this rank's position among the shards

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.param.shape[0], self.param.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype

    @property
    def device(self) -> torch.device:
        return self.rows_local.device

    @property
    def numel_local(self) -> int:
        """Weights that this rank holds."""
        return self.rows_local.numel()

    @property
    def columns(self) -> int:
        return self.param.shape[1]

    @property
    def rows_local(self) -> Tensor:
        """``[m_local, n]``, this rank's rows; shares memory with the parameter."""
        return local_tensor(self.param)

    @property
    def offset_local(self) -> int:
        """Flat index, in the whole matrix, of this rank's first entry."""
        return self.row_bounds[self.shard] * self.columns

    @property
    def address(self) -> int:
        """Memory address of this rank's first entry, for kernels that write the weights directly."""
        return self.rows_local.data_ptr()

    def read(self, indices: Tensor) -> Tensor:
        """``[k]`` in the dtype of the model: the weights at flat local ``indices``."""
        return self.rows_local.view(-1).index_select(0, indices)

    def write(self, indices: Tensor, values: Tensor) -> None:
        """Set the weights at flat local ``indices`` to ``values [k]``, rounded to the dtype of the model."""
        rows = self.rows_local.view(-1)
        rows.index_copy_(0, indices.long(), values.to(rows))


def describe(name: str, param: nn.Parameter) -> Matrix:
    """The :class:`Matrix` of a parameter. Raises ``ValueError`` for a sharding other than by rows over one axis."""
    if isinstance(param, DTensor):
        mesh, placements = param.device_mesh, param.placements
        axes = [axis for axis, placement in enumerate(placements) if placement == Shard(0)]
        others = [placement for placement in placements if not placement.is_replicate() and placement != Shard(0)]
        if len(axes) != 1 or others:
            raise ValueError(f"{name}: must be sharded by rows over one mesh axis, got {placements}")
        shards, shard = mesh.size(axes[0]), mesh.get_local_rank(axes[0])
        if param.device.type != mesh.device_type:
            raise ValueError(f"{name}: shards offloaded to {param.device.type} are not supported")
    else:
        shards, shard = 1, 0
    if not local_tensor(param).is_contiguous():
        raise ValueError(f"{name}: its memory must be contiguous, got strides {local_tensor(param).stride()}")
    return Matrix(name, param, row_bounds(param.shape[0], shards), shard)


def check_alike(matrices: Sequence[Matrix]) -> None:
    """Raises ``ValueError`` unless all matrices are sharded over the same ranks, or none is: they share one flat vector."""

    def layout(matrix: Matrix) -> object:
        param = matrix.param
        return (param.device_mesh, param.placements) if isinstance(param, DTensor) else "not sharded"

    for matrix in matrices:
        if layout(matrix) != layout(matrices[0]):
            raise ValueError(
                f"all trained matrices must be sharded alike: {matrices[0].name} is {layout(matrices[0])}, "
                f"{matrix.name} is {layout(matrix)}"
            )


def shard_group(param: nn.Parameter) -> Group:
    """The ranks that hold the rows of one replica; None if this rank holds them all."""
    if not isinstance(param, DTensor):
        return None
    return param.device_mesh.get_group(param.placements.index(Shard(0)))


def default_replicate_group(param: nn.Parameter) -> Group:
    """The ranks that hold the same rows; None if there are no others. Raises ``ValueError`` if they cannot be inferred."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if not isinstance(param, DTensor):
        return dist.group.WORLD
    if param.device_mesh.size() == dist.get_world_size():
        return None  # all ranks hold shards, or FSDP synchronises its own replicas
    raise ValueError(
        f"the model is sharded over {param.device_mesh.size()} of {dist.get_world_size()} ranks: pass replicate_group"
    )
