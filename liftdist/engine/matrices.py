"""The trained matrices of a model: which they are, where they are in memory, and how they are sharded.

every linear layer of the decoder that matches, except head and routers       W [m, n], a parameter, as it is stored: rows
                                                                              make outputs, unless it is transposed
the matrices of experts, which a model holds in one parameter of a layer     [E, R, C]: gate, up and down of each expert

A parameter is plain, or sharded by its first dimension with FSDP2. Seen as rows of its last dimension, ``[E R, C]``, a matrix is
a run of rows of it, in all of its columns or in evenly spaced ones. Flat indices are into the matrix, or into this rank's rows
of it; positions are into the memory of this rank's part of the parameter. Both are the same if the parameter is the matrix.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from liftdist.distributed.collectives import Group
from liftdist.distributed.rows import row_bounds
from liftdist.distributed.sharding import local_tensor
from liftdist.engine import memory, quantised
from liftdist.engine.decoder import is_linear, output_head, towers
from liftdist.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a matrix is: ``rows`` rows from ``first_row`` of a parameter ``[..., C]``, in ``columns`` columns, ``step`` apart."""

    parameter: str  # its name in the model
    param: nn.Parameter
    rows: int
    columns: int
    first_row: int = 0
    first_column: int = 0
    step: int = 1
    is_transposed: bool = False  # whether columns make the outputs, and rows read the inputs

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def width(self) -> int:
        """Entries in a row of the parameter; a vector is a column."""
        return self.param.shape[-1] if self.param.ndim > 1 else 1

    def row_bounds(self, shards: int) -> tuple[int, ...]:
        """``[shards + 1]``: shard ``s`` holds rows ``bounds[s]`` to ``bounds[s + 1]`` of the matrix."""
        inner = self.param.shape[1:-1].numel()  # rows in each entry of the first dimension
        bounds = [bound * inner for bound in row_bounds(self.param.shape[0], shards)]
        return tuple(min(max(bound - self.first_row, 0), self.rows) for bound in bounds)

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is the parameter."""
        return tuple(self.param.shape) == self.shape


def principal_matrices(model: nn.Module, patterns: Sequence[str] = ("*",)) -> dict[str, Place]:
    """The matrices to train by name: of every linear layer and every expert of the decoder whose name matches a pattern.

    The output head, and routers, which choose experts, are left out. An expert's matrices are named as linear modules would be:
    ``LAYER.experts.3.gate_proj.weight``.

    Raises:
        UserError: a pattern that no module matches.
    """
    every = _linears(model)
    modules = {name: name.removesuffix(".weight") for name in every}
    for pattern in patterns:
        if not any(fits(module, [pattern]) for module in modules.values()):
            example = f"; one module is named {next(iter(modules.values()))}" if every else ""
            raise UserError(f"no linear module fits {pattern}{example}")
    return {name: place for name, place in every.items() if fits(modules[name], patterns)}


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether the name of a module fits one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name that choose experts or weigh them, with an entry for each or one, or are of an indexer of tokens."""
    experts = {  # their number, by the name of the module that holds them
        name: len({key.partition(".")[0] for key in matrices})
        for name, module in model.named_modules()
        if (matrices := dict(_of_experts(module)))
    }
    beside = {name.rpartition(".")[0]: number for name, number in experts.items()}

    def chooses(name: str, param: nn.Parameter) -> bool:
        module = name.rpartition(".")[0]
        if "indexer" in module.split("."):
            return True
        if module in experts or module.endswith("_proj") or param.ndim > 2:
            return False
        numbers = [number for holder, number in beside.items() if module.startswith(f"{holder}.")]
        return any(param.shape[:1].numel() in (1, number) for number in numbers)

    return {name: param for name, param in model.named_parameters() if chooses(name, param)}


def _linears(model: nn.Module) -> dict[str, Place]:
    """All matrices that can be trained, by name."""
    left_out = {module for tower in towers(model) for module in tower.modules()} | {output_head(model)}
    choosing = set(routers(model).values())
    names = {id(param): name for name, param in model.named_parameters()}
    found: dict[str, Place] = {}
    for name, module in model.named_modules():
        if module in left_out:
            continue
        if matrices := dict(_of_experts(module)):
            found |= {
                f"{name}.{key}": Place(names[id(param)], param, *place) for key, (param, place) in matrices.items()
            }
        elif is_linear(module) and module.weight not in choosing:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            (rows, columns), is_transposed = weight.shape, not isinstance(module, nn.Linear)
            found[names[id(weight)]] = Place(names[id(weight)], weight, rows, columns, is_transposed=is_transposed)
    return found


def _of_experts(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, tuple[Any, ...]]]]:
    """The matrices of a module that holds those of ``E`` experts in 3-D parameters: names, and the fields of their places.

    gate_up_proj  [E, 2 I, H], gate above up; or [E, H, 2 I], transposed, gate left of up, or in even and up in odd columns
    up_proj       [E, I, H] or [E, H, I], of experts without a gate
    down_proj     [E, H, I] or [E, I, H]

    Without a gate the shapes are the same both ways: transformers says ``is_transposed``.
    """
    down, both = getattr(module, "down_proj", None), getattr(module, "gate_up_proj", None)
    if not isinstance(down, nn.Parameter) or down.ndim != 3:
        return
    is_transposed = getattr(module, "is_transposed", False)
    if isinstance(both, nn.Parameter) and both.ndim == 3:
        is_transposed = both.shape[1] == down.shape[2]
    whole = 0, 1, is_transposed  # all columns
    for key, param in (("gate_up_proj", both), ("up_proj", getattr(module, "up_proj", None)), ("down_proj", down)):
        if not isinstance(param, nn.Parameter) or param.ndim != 3:
            continue
        number, rows, columns = param.shape
        for expert in range(number):
            first = expert * rows
            if key != "gate_up_proj":
                yield f"{expert}.{key}.weight", (param, (rows, columns, first, *whole))
            elif (rows, columns) == (2 * down.shape[2], down.shape[1]):
                yield f"{expert}.gate_proj.weight", (param, (rows // 2, columns, first, *whole))
                yield f"{expert}.up_proj.weight", (param, (rows // 2, columns, first + rows // 2, *whole))
            elif (rows, columns) == (down.shape[2], 2 * down.shape[1]):
                half = columns // 2
                second, step = (half, 1) if getattr(module, "is_concatenated", True) else (1, 2)
                yield f"{expert}.gate_proj.weight", (param, (rows, half, first, 0, step, is_transposed))
                yield f"{expert}.up_proj.weight", (param, (rows, half, first, second, step, is_transposed))


@dataclass(frozen=True)
class Matrix:
    """A trained matrix and this rank's part of it. All access to its memory goes through this class."""

    name: str
    place: Place  # its parameter is plain, or a DTensor sharded by its first dimension
    row_bounds: tuple[int, ...]  # [shards + 1] shard s holds rows row_bounds[s] to row_bounds[s + 1]
    shard: int  # this rank's position among the shards
    first_position: int  # of this rank's first entry
    dtype: torch.dtype  # of the weights in the model; the parameter may be kept in a higher one

    @property
    def param(self) -> nn.Parameter:
        return self.place.param

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix."""
        return self.place.shape

    @property
    def numel(self) -> int:
        """Weights of the whole matrix."""
        return self.place.numel

    @property
    def device(self) -> torch.device:
        return local_tensor(self.param).device

    @property
    def numel_local(self) -> int:
        """Weights that this rank holds."""
        return (self.row_bounds[self.shard + 1] - self.row_bounds[self.shard]) * self.columns

    @property
    def columns(self) -> int:
        return self.place.columns

    @property
    def rows_local(self) -> Tensor:
        """``[m_local, n]``, this rank's rows; shares memory with the parameter, unless that is quantised."""
        begin = self.first_position // self.place.width if self.numel_local else 0
        rows = memory.rows(self.param, begin, begin + self.numel_local // self.columns)
        first, step = self.place.first_column, self.place.step
        return rows[:, first : first + (self.columns - 1) * step + 1 : step]

    @property
    def is_packed(self) -> bool:
        """Whether its rows are sent as they are kept, quantised."""
        return quantised.held_by(self.param) is not None and self.columns == self.place.width

    @property
    def sent(self) -> Tensor:
        """``[bytes]`` uint8: this rank's rows, for :meth:`received`."""
        held = quantised.held_by(self.param)
        if held is None or not self.is_packed:
            return self.rows_local.contiguous().view(-1).view(torch.uint8)
        begin = self.first_position // self.columns if self.numel_local else 0
        return held.packed(begin, begin + self.numel_local // self.columns)

    def received(self, sent: Tensor, sizes: Sequence[int]) -> Tensor:
        """``[m, n]``, the whole matrix: what the shards have :attr:`sent`, ``sizes`` bytes each, one after the other."""
        held = quantised.held_by(self.param)
        if held is None or not self.is_packed:
            return sent.view(self.dtype).view(self.shape)
        whole = torch.empty(self.shape, dtype=self.dtype, device=sent.device)
        for part, begin, end in zip(sent.split(list(sizes)), self.row_bounds, self.row_bounds[1:], strict=False):
            quantised.unpack(part, held.format, whole[begin:end])
        return whole

    @property
    def offset_local(self) -> int:
        """Flat index, in the whole matrix, of this rank's first entry."""
        return self.row_bounds[self.shard] * self.columns

    def cut(self, indices: Tensor) -> Tensor:
        """``[k_local]``, into this rank's rows: those of sorted flat ``indices [k]``, into the whole matrix, that are in them."""
        begin = self.offset_local
        ends = torch.tensor([begin, begin + self.numel_local], dtype=indices.dtype, device=indices.device)
        low, high = torch.searchsorted(indices, ends).tolist()
        return indices[low:high] - begin

    def positions(self, indices: Tensor) -> Tensor:
        """Where flat local ``indices`` are in this rank's part of the parameter, in the same dtype."""
        if self.place.is_whole:
            return indices
        rows = indices // self.columns
        return rows * self.place.width + (indices - rows * self.columns) * self.place.step + self.first_position

    def indices(self, positions: Tensor) -> Tensor:
        """The inverse of :meth:`positions`."""
        if self.place.is_whole:
            return positions
        rows = (positions - self.first_position) // self.place.width
        offsets = positions - self.first_position - rows * self.place.width
        return rows * self.columns + offsets // self.place.step

    def read(self, indices: Tensor) -> Tensor:
        """``[k]`` in the dtype of the model: the weights at flat local ``indices``."""
        return memory.read(self.param, self.positions(indices))

    def write(self, indices: Tensor, values: Tensor) -> None:
        """Set the weights at flat local ``indices`` to ``values [k]``, rounded to the dtype of the model."""
        memory.write(self.param, self.positions(indices), values)


def describe(name: str, place: Place, dtype: torch.dtype | None = None) -> Matrix:
    """The :class:`Matrix` at a place, of weights in ``dtype``, by default that of the parameter.

    Raises:
        ValueError: a sharding other than by the first dimension over one axis.
    """
    param = place.param
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
    local = local_tensor(param)
    if not local.is_contiguous():
        raise ValueError(f"{name}: its memory must be contiguous, got strides {local.stride()}")
    if local.numel() >= 2**31:
        raise ValueError(f"{name}: a rank holds {local.numel()} of its weights, at most {2**31 - 1} are supported")
    bounds = place.row_bounds(shards)
    begin = (
        row_bounds(param.shape[0], shards)[shard] * param.shape[1:-1].numel()
    )  # the first row here, of the parameter
    first = place.first_row + bounds[shard] - begin
    return Matrix(name, place, bounds, shard, first * place.width + place.first_column, dtype or param.dtype)


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
