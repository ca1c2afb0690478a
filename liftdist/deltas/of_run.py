"""Where deltas come from: a checkpoint of a run, or two model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from liftdist.deltas.delta import Change, Delta, bits, check_fits
from liftdist.errors import UserError
from liftdist.models.hub import resolve_model
from liftdist.models.names import NameMap
from liftdist.models.weights import ModelFolder
from liftdist.runs import checkpoint, claims
from liftdist.runs.checkpoint import Step


def of_run(step: Step, base: Path) -> Delta:
    """What a run has changed by a checkpoint.

    Raises:
        UserError: ``base`` does not hold the parameters.
    """
    stored_files = ModelFolder(base)
    trained = step.manifest.parameters
    names = NameMap(step.manifest.snapshot.names)
    if not names.stored:  # written before the map was kept
        prefix = next(iter(trained)).partition(".")[0]
        names = NameMap.between(trained, stored_files.file_of, prefix)
    for name in trained:
        if names.stored.get(name) not in stored_files.file_of:
            raise UserError(f"{base}: has no {name}, which the run trained; --base must name the model it started from")

    def get(stored: str) -> Change:
        try:
            indices, values = step.touched(names.parameter[stored])
        except FileNotFoundError:
            raise UserError(f"{step.folder}: was removed meanwhile; a file named keep in it keeps it") from None
        tensor = stored_files.read(stored)
        dtype = torch.promote_types(tensor.dtype, values.dtype)
        check_fits(stored, indices, tensor.numel())
        before, after = tensor.flatten()[indices].to(dtype), values.to(dtype)
        changed = bits(before) != bits(after)
        return Change(tuple(tensor.shape), tensor.dtype, indices[changed], after[changed], before[changed])

    return Delta(step.folder, step.manifest.provenance.base, list(names.parameter), get)


def between(before: Path, after: Path, base: str) -> Delta:
    """What changed between two folders of one architecture; ``base`` is the digest of the first.

    Raises:
        UserError: they do not hold the same tensors.
    """
    old, new = ModelFolder(before), ModelFolder(after)
    if missing := sorted(set(old.file_of) ^ set(new.file_of)):
        folder = after if missing[0] in old.file_of else before
        raise UserError(f"{folder}: has no {missing[0]}, the other folder does")
    for name in old.file_of:
        if old.info(name)["shape"] != new.info(name)["shape"]:
            raise UserError(f"{name} is {old.info(name)['shape']} in {before}, {new.info(name)['shape']} in {after}")

    def get(name: str) -> Change:
        first, second = old.read(name), new.read(name)
        dtype = torch.promote_types(first.dtype, second.dtype)
        flat, other = first.flatten().to(dtype), second.flatten().to(dtype)
        indices = (bits(flat) != bits(other)).nonzero().squeeze(1)
        return Change(tuple(first.shape), first.dtype, indices, other[indices], flat[indices])

    return Delta(after, base, sorted(old.file_of), get)


def of_run_dir(
    run_dir: Path, number: int | None, base: Path | None, say: Callable[[str], None] = lambda _: None
) -> tuple[Delta, Path, torch.dtype]:
    """What a run has changed by a step, or by its newest checkpoint; its base model; the dtype it was trained in.

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
    if base is None:
        try:
            base = resolve_model(OmegaConf.create(step.manifest.provenance.config).model.path)
        except OmegaConfBaseException as error:
            raise UserError(f"{run_dir}: model.path: {str(error).splitlines()[0]}; give --base") from None
        except UserError as error:
            raise UserError(f"{error}; give --base") from None
    dtype = next(iter(step.manifest.parameters.values())).dtype
    return of_run(step, base), base, getattr(torch, dtype)
