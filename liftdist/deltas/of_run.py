"""Deltas from a checkpoint of a run, or from two model folders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from liftdist.deltas import adapter
from liftdist.deltas.adapter import Adapters
from liftdist.deltas.delta import ORIGIN, Change, Delta, bits, check_fits
from liftdist.errors import UserError
from liftdist.models import names as tensor_names
from liftdist.models.hub import resolve_model
from liftdist.models.names import Part
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint, claims
from liftdist.runs.checkpoint import FIRST, Step


def of_run(step: Step, base_folder: Path) -> Delta:
    """What a run changed up to a checkpoint.

    Raises:
        UserError: ``base_folder`` lacks parameters of the run.
    """
    stored_files = ModelFolder(base_folder)
    trained, names = step.manifest.parameters, step.manifest.snapshot.names
    adapters = adapter.of_step(step)
    if not names:  # a checkpoint of a version that did not save the map
        prefix = next(iter(trained)).partition(".")[0]
        names = tensor_names.between(trained, stored_files.file_of, prefix)
    for name in names if adapters else trained:
        if names.get(name) not in stored_files.file_of:
            raise UserError(
                f"{base_folder}: has no {name}, which the run trained; --base must name the model it started from"
            )
    matrices: dict[str, list[str]] = {}  # of each tensor
    for name, stored in names.items():
        for tensor in (stored, *step.manifest.snapshot.copies.get(stored, ())):
            matrices.setdefault(tensor, []).append(name)

    def get(stored: str) -> Change:
        tensor = stored_files.read(stored)
        if whole is not None:
            return _difference(tensor, whole(stored, tensor))
        with _held(step):
            found = [_touched(step, name) for name in matrices[stored]]
        indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = indices.argsort()
        indices, values = indices[order], values[order]
        dtype = torch.promote_types(tensor.dtype, values.dtype)
        check_fits(stored, indices, tensor.numel())
        before, after = tensor.flatten()[indices].to(dtype), values.to(dtype)
        changed = bits(before) != bits(after)
        return Change(tuple(tensor.shape), tensor.dtype, indices[changed], after[changed], before[changed])

    def replaced(stored: str, tensor: Tensor) -> Tensor:
        with _held(step):
            return _replaced(step, adapters, matrices[stored], tensor)

    is_whole = adapters is not None or any(FIRST in entry.keys for entry in trained.values())
    whole = replaced if is_whole else None
    return Delta(step.folder, step.manifest.provenance.base, list(matrices), get, _origin(step), whole, adapters)


@contextlib.contextmanager
def _held(step: Step) -> Iterator[None]:
    """Raises ``UserError`` where a file of the checkpoint is not there any more."""
    try:
        yield
    except FileNotFoundError:
        raise adapter.removed(step) from None


def _touched(step: Step, name: str) -> tuple[Tensor, Tensor]:
    """Every weight of a matrix that the run has ever trained: flat indices in the tensor that holds it, and values."""
    indices, values = step.touched(name)
    part = step.manifest.snapshot.parts.get(name)
    return (indices if part is None else Part(*part).indices(indices, step.manifest.parameters[name].shape[1])), values


def _replaced(step: Step, adapters: Adapters | None, names: Sequence[str], tensor: Tensor) -> Tensor:
    """A tensor of the base model with the matrices in it as they are after training, in a dtype that holds both."""
    entries, parts = step.manifest.parameters, step.manifest.snapshot.parts
    dtype = getattr(torch, next(iter(entries.values())).dtype)
    held = [dtype] if adapters else [getattr(torch, entries[name].dtype) for name in names]
    flat = tensor.flatten().to(functools.reduce(torch.promote_types, held, tensor.dtype), copy=True)
    for name in names:
        module = name.removesuffix(".weight")
        rows, columns = adapters.shape(module) if adapters else entries[name].shape
        offset, row, column = parts.get(name) or (0, columns, 1)
        matrix = flat.as_strided((rows, columns), (row, column), offset)
        if adapters:
            matrix.copy_(adapters.merged(module, matrix.to(dtype)).to(dtype))  # from the weights as the run loaded them
        else:
            matrix.copy_(step.whole(name, "values").to(getattr(torch, entries[name].dtype)).view(rows, columns))
    return flat.view(tensor.shape)


def _difference(before: Tensor, after: Tensor) -> Change:
    """The entries that differ, to the bit."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    first, second = before.flatten().to(dtype), after.flatten().to(dtype)
    indices = (bits(first) != bits(second)).nonzero().squeeze(1)
    return Change(tuple(before.shape), before.dtype, indices, second[indices], first[indices])


def _origin(step: Step) -> dict[str, str]:
    """Name and commit of the run's base model on the hub; empty for a local folder, or if they were not recorded."""
    name, _, commit = step.manifest.provenance.commits.get("model.path", "").rpartition("@")
    return dict(zip(ORIGIN, (name, commit), strict=True)) if name else {}


def _base_folder(step: Step) -> Path:
    """The folder of the run's base model: of the commit that the run used, wherever its branch is now."""
    if origin := _origin(step):
        return resolve_model(origin["base_model"], origin["base_commit"])
    model = OmegaConf.create(step.manifest.provenance.config).model
    return resolve_model(model.path, model.get("revision"))


def between(before: Path, after: Path, base_digest: str) -> Delta:
    """What changed between two folders of one architecture; ``base_digest`` is that of the first.

    Raises:
        UserError: their tensors differ in names or shapes.
    """
    old, new = ModelFolder(before), ModelFolder(after)
    if missing := sorted(set(old.file_of) ^ set(new.file_of)):
        folder = after if missing[0] in old.file_of else before
        raise UserError(f"{folder}: has no {missing[0]}, the other folder does")
    for name in old.file_of:
        if old.info(name)["shape"] != new.info(name)["shape"]:
            raise UserError(f"{name} is {old.info(name)['shape']} in {before}, {new.info(name)['shape']} in {after}")

    def get(name: str) -> Change:
        return _difference(old.read(name), new.read(name))

    return Delta(after, base_digest, sorted(old.file_of), get)


def of_run_dir(
    run_dir: Path, number: int | None, base_folder: Path | None, say: Callable[[str], None] = lambda _: None
) -> tuple[Delta, Path, torch.dtype]:
    """What a run changed up to step ``number``, or its newest checkpoint; its base model; the dtype it was trained in.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or no base model.
    """
    steps = checkpoint.accepted(run_dir, claims.attempts(run_dir))
    if number is not None:
        name = f"step-{number:08d}"
        if name not in steps:
            held = ", ".join(str(int(step.removeprefix("step-"))) for step in sorted(steps)) or "none"
            raise UserError(f"{run_dir}: has no checkpoint of step {number}; those it has: {held}")
        steps = {name: steps[name]}
    if not steps:
        raise UserError(f"{run_dir}: holds no checkpoint")
    step = checkpoint.newest(run_dir, steps, 0, 1, say, set_aside=False)
    assert step is not None
    say(f"exporting {step.folder}")
    if base_folder is None:
        try:
            base_folder = _base_folder(step)
        except OmegaConfBaseException as error:
            raise UserError(f"{run_dir}: model.path: {str(error).splitlines()[0]}; give --base") from None
        except UserError as error:
            raise UserError(f"{error}; give --base") from None
    dtype = next(iter(step.manifest.parameters.values())).dtype
    return of_run(step, base_folder), base_folder, getattr(torch, dtype)
