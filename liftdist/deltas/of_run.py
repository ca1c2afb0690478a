"""Deltas from a checkpoint of a run, or from two model folders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from liftdist.deltas import adapter
from liftdist.deltas.adapter import Adapters
from liftdist.deltas.delta import ORIGIN, Change, Delta, bits, check_fits, is_plain
from liftdist.errors import UserError
from liftdist.models.hub import cached_model, resolve_model
from liftdist.models.part import Part
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint, claims
from liftdist.runs.checkpoint import FIRST, Step
from liftdist.runs.manifest import Provenance, Snapshot
from liftdist.safetensors_io import DTYPES


def of_run(step: Step, base_folder: Path) -> Delta:
    """What a run changed up to a checkpoint.

    Raises:
        UserError: ``base_folder`` lacks parameters of the run.
    """
    stored_files = ModelFolder(base_folder)
    trained = step.manifest.parameters
    adapters = adapter.of_step(step, base_folder)
    matrices = matrices_of(step, stored_files, adapters)

    def get(stored: str) -> Change:
        tensor = stored_files.read(stored)
        if whole is not None:
            return _difference(tensor, whole(stored, tensor))
        with held(step):
            indices, values = in_tensor(matrices[stored], step.touched, step.manifest.snapshot, step.columns)
        dtype = torch.promote_types(tensor.dtype, values.dtype)
        check_fits(stored, indices, tensor.numel())
        before, after = tensor.flatten()[indices].to(dtype), values.to(dtype)
        changed = bits(before) != bits(after)
        if "base_dtype" in made:  # the others are exact over a base that was rounded
            changed = torch.ones_like(changed)
        return Change(tuple(tensor.shape), tensor.dtype, indices[changed], after[changed], before[changed])

    def replaced(stored: str, tensor: Tensor) -> Tensor:
        with held(step):
            return _replaced(step, adapters, matrices[stored], tensor)

    is_whole = adapters is not None or any(FIRST in entry.keys for entry in trained.values())
    whole = replaced if is_whole else None
    made = {"run": step.folder.resolve().parent.parent.name, "step": step.number} | rounded(step)
    base, sha256 = step.manifest.provenance.base, step.manifest.sha256
    origin, trusted = origin_of(step.manifest.provenance), adapter.trusts(step)
    return Delta(step.folder, base, list(matrices), get, origin, whole, adapters, made, sha256, trusted=trusted)


def matrices_of(step: Step, stored_files: ModelFolder, adapters: Adapters | None = None) -> dict[str, list[str]]:
    """The trained matrices that are in each tensor of the base model. Raises ``UserError`` if it lacks one."""
    trained, names = step.manifest.parameters, step.manifest.snapshot.names
    if not names:  # a checkpoint of a version that did not save the map
        from liftdist.models import names as tensor_names  # with transformers, which takes seconds to import

        prefix = next(iter(trained)).partition(".")[0]
        names = tensor_names.between(trained, stored_files.file_of, prefix)
    for name in names if adapters else trained:
        if names.get(name) not in stored_files.file_of:
            raise UserError(
                f"{stored_files.folder}: has no {name}, which the run trained; --base must name the model it started from"
            )
    return by_tensor(names, step.manifest.snapshot.copies)


def by_tensor(names: Mapping[str, str], copies: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The matrices in each tensor of the base model, from the tensor of each matrix and the copies of tensors."""
    matrices: dict[str, list[str]] = {}
    for name, stored in names.items():
        for tensor in (stored, *copies.get(stored, ())):
            matrices.setdefault(tensor, []).append(name)
    return matrices


def in_tensor(
    matrices: Sequence[str],
    touched: Callable[[str], tuple[Tensor, Tensor]],
    snapshot: Snapshot,
    columns: Callable[[str], int],
) -> tuple[Tensor, Tensor]:
    """Every weight of a tensor that a run has ever trained: ``[t]`` int64 sorted flat indices, and ``[t]`` values.

    Args:
        matrices: in the tensor.
        touched: the same of a matrix.
        columns: of a matrix that is a part of the tensor.
    """
    found = []
    for name in matrices:
        indices, values = touched(name)
        part = snapshot.parts.get(name)
        found.append((indices if part is None else Part(*part).indices(indices, columns(name)), values))
    if len(found) == 1 and snapshot.parts.get(matrices[0]) is None:
        return found[0]  # sorted already
    indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = indices.argsort()
    return indices[order], values[order]


@contextlib.contextmanager
def held(step: Step) -> Iterator[None]:
    """Raises ``UserError`` where a file of the checkpoint is not there any more."""
    try:
        yield
    except FileNotFoundError:
        raise adapter.removed(step) from None


def _replaced(step: Step, adapters: Adapters | None, names: Sequence[str], tensor: Tensor) -> Tensor:
    """A tensor of the base model with the matrices in it as they are after training, in a dtype that holds both."""
    entries, parts = step.manifest.parameters, step.manifest.snapshot.parts
    dtype = getattr(torch, next(iter(entries.values())).dtype)
    held = [dtype] if adapters else [getattr(torch, entries[name].dtype) for name in names]
    flat = tensor.flatten().to(functools.reduce(torch.promote_types, held, tensor.dtype), copy=True)
    for name in names:
        module = name.removesuffix(".weight")
        rows, columns = adapters.shape(module) if adapters else entries[name].shape
        matrix = matrix_in(flat, parts.get(name), rows, columns)
        if adapters:
            matrix.copy_(adapters.merged(module, matrix.to(dtype)).to(dtype))  # from the weights as the run loaded them
        else:
            matrix.copy_(step.whole(name, "values").to(getattr(torch, entries[name].dtype)).view(rows, columns))
    return flat.view(tensor.shape)


def matrix_in(flat: Tensor, part: Sequence[int] | None, rows: int, columns: int) -> Tensor:
    """``[rows, columns]``, a view of the matrix that a part of a stored tensor is, or all of it."""
    offset, row, column = part or (0, columns, 1)
    return flat.as_strided((rows, columns), (row, column), offset)


def _difference(before: Tensor, after: Tensor) -> Change:
    """The entries that differ, to the bit."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    first, second = before.flatten().to(dtype), after.flatten().to(dtype)
    indices = (bits(first) != bits(second)).nonzero().squeeze(1)
    return Change(tuple(before.shape), before.dtype, indices, second[indices], first[indices])


def rounded(step: Step) -> dict[str, str]:
    """How the base was rounded in the run, and in which dtype the run computed; nothing if it was not."""
    kind = OmegaConf.select(OmegaConf.create(step.manifest.provenance.config), "model.base_dtype")
    return {} if kind is None else {"base_dtype": kind, "dtype": next(iter(step.manifest.parameters.values())).dtype}


def origin_of(provenance: Provenance) -> dict[str, str]:
    """Name and commit of the run's base model on the hub; empty for a local folder, or if they were not recorded."""
    name, _, commit = provenance.commits.get("model.path", "").rpartition("@")
    return dict(zip(ORIGIN, (name, commit), strict=True)) if name else {}


def base_folder(step: Step, download: bool = True) -> Path:
    """The folder of the run's base model: of the commit that the run used, wherever its branch is now.

    Args:
        download: whether a model of the hub that is not in its cache is downloaded.

    Raises:
        UserError: there is no such folder, hub model, or, without a download, none in the cache.
    """
    try:
        if (origin := origin_of(step.manifest.provenance)) and not download:
            return cached_model(origin["base_model"], origin["base_commit"])
        if origin:
            return resolve_model(origin["base_model"], origin["base_commit"])
        model = OmegaConf.create(step.manifest.provenance.config).model
        return resolve_model(model.path, model.get("revision"))
    except OmegaConfBaseException as error:
        run_dir = step.folder.parent.parent
        raise UserError(f"{run_dir}: model.path: {str(error).splitlines()[0]}; give --base") from None
    except UserError as error:
        raise UserError(f"{error}; give --base") from None


def between(before: Path, after: Path, base_digest: str) -> Delta:
    """What changed between two folders of one architecture; ``base_digest`` is that of the first.

    Raises:
        UserError: their tensors differ in names or shapes, or have dtypes that none holds both of.
    """
    old, new = ModelFolder(before), ModelFolder(after)
    if missing := sorted(set(old.file_of) ^ set(new.file_of)):
        folder = after if missing[0] in old.file_of else before
        raise UserError(f"{folder}: has no {missing[0]}, the other folder does")
    for name in old.file_of:
        if old.info(name)["shape"] != new.info(name)["shape"]:
            raise UserError(f"{name} is {old.info(name)['shape']} in {before}, {new.info(name)['shape']} in {after}")
        kinds = [folder.info(name)["dtype"] for folder in (old, new)]
        if kinds[0] != kinds[1] and not all(is_plain(DTYPES[kind]) for kind in kinds):
            raise UserError(f"{name} is {kinds[0]} in {before}, {kinds[1]} in {after}: no dtype holds both")

    def get(name: str) -> Change:
        return _difference(old.read(name), new.read(name))

    return Delta(after, base_digest, sorted(old.file_of), get, made={"diff": after.resolve().name})


def of_run_dir(
    run_dir: Path, number: int | None, base: Path | None, say: Callable[[str], None] = lambda _: None
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
    step = intact(run_dir, steps, say)
    say(f"exporting {step.folder}")
    base = base or base_folder(step)
    dtype = next(iter(step.manifest.parameters.values())).dtype
    return of_run(step, base), base, getattr(torch, dtype)


def of_checkpoints(run_dir: Path, base: Path | None) -> tuple[list[Delta], Path]:
    """What a run changed up to each of its checkpoints, in their order; its base model.

    Raises:
        UserError: no such run or checkpoint, one that is damaged, or no base model.
    """
    steps = checkpoint.accepted(run_dir, claims.attempts(run_dir))
    found: list[Step] = []
    for name in sorted(steps, key=checkpoint.step_number):
        said: list[str] = []
        try:
            found.append(intact(run_dir, {name: steps[name]}, said.append))
        except UserError:
            why = said[-1] if said else f"{name} is not intact"
            raise UserError(
                f"{run_dir}: {why}; merge deltas of the others: liftdist export {run_dir} --step N --format delta"
            ) from None
    if not found:
        raise UserError(f"{run_dir}: holds no checkpoint")
    base = base or base_folder(found[-1])
    return [of_run(step, base) for step in found], base


def intact(run_dir: Path, steps: Mapping[str, str], say: Callable[[str], None] = lambda _: None) -> Step:
    """The newest of ``steps`` that is intact. Raises ``UserError`` if there is none."""
    step = checkpoint.newest(run_dir, steps, 0, 1, say, set_aside=False) if steps else None
    if step is None:
        raise UserError(f"{run_dir}: holds no checkpoint")
    return step
