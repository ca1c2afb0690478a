"""What training did to the weights, from a run's checkpoints and its base model: where they lie, how much they changed, and how.

    share        of a matrix's weights that are principal
    rows         share of them in the densest tenth of the rows, 10 % if they are spread evenly; the same for columns
    survived     share of the oldest kept checkpoint's principal weights that the newest has, too
    magnitude    share of them that are among as many of the largest |W|
    update       ||D|| / ||W||, Frobenius norms, of the difference D to the base model's matrix W
    stable rank  ||D||^2 / s_1(D)^2, s_1 the largest singular value

Of a few matrices, factored as U S V^T:

    captured(r)  ||U_r^T D V_r||^2 / ||D||^2, the part of the update in the span of the r leading singular vectors of W
    intruders    of the 10 leading left singular vectors of W + D, those whose cosine with each of W's is below 0.5
                 (Shuttleworth et al. 2024, arXiv 2410.21228, algorithm 1)

One matrix is in memory at a time, and nothing begins after the time is over: matrices are taken in random order, so that those
that were reached stand for all.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from liftdist.deltas import of_run
from liftdist.deltas.delta import Change, Delta
from liftdist.distributed.collectives import all_reduce_sum
from liftdist.engine.principal import PrincipalWeights
from liftdist.errors import UserError
from liftdist.models import weights
from liftdist.models.weights import ModelFolder
from liftdist.report.read import Run
from liftdist.runs import checkpoint, claims
from liftdist.runs.checkpoint import FIRST, Step
from liftdist.schema import Config

EXAMINED, COSINE = 10, 0.5  # of intruder dimensions
_FACTORED = 6  # matrices at most


@dataclass(frozen=True)
class Factored:
    """The singular values of one matrix and of its update, descending, and how the two lie to each other."""

    name: str
    shape: tuple[int, int]  # m, n
    base: np.ndarray  # [k], k = min(m, n)
    update: np.ndarray  # [k]
    captured: np.ndarray  # [k]: entry r - 1 is captured(r)
    intruders: int


@dataclass
class Weights:
    """What was found; figures are by matrix, and absent where the time was over."""

    step: int | None = None  # of the newest checkpoint
    selected: int = 0  # principal weights, of the whole model
    share: dict[str, float] = field(default_factory=dict)
    rows: dict[str, float] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)
    survived: dict[str, float] = field(default_factory=dict)
    magnitude: dict[str, float] = field(default_factory=dict)
    update: dict[str, float] = field(default_factory=dict)
    stable_rank: dict[str, float] = field(default_factory=dict)
    factored: list[Factored] = field(default_factory=list)
    since: int | None = None  # step of the oldest kept checkpoint, that of `survived`
    notes: list[str] = field(default_factory=list)  # what is left out, and why


def of(run: Run, base: Path | None, seconds: float) -> Weights:
    """What can be said of a run's weights.

    Args:
        base: folder of the base model, if it is not where the run found it.
        seconds: after which no further matrix is begun.

    Raises:
        UserError: ``base`` is not the model that the run started from.
    """
    found, began = Weights(), time.monotonic()
    try:
        steps = _steps(run.folder)
        if not steps:
            found.notes.append("There is no checkpoint.")
            return found
        newest = steps[-1]
        found.step = newest.number
        if not any(FIRST in entry.keys for entry in newest.manifest.parameters.values()):
            _lie(found, steps, _until(began + seconds / 4))
    except (OSError, ValueError) as error:  # a run that goes on may have removed it
        found.notes.append(f"The checkpoint cannot be read: {error}")
        return found
    try:
        folder = base or of_run.base_folder(newest, download=False)
        cache_dir = Path(str(run.settings.get("cache_dir", Config().cache_dir))).expanduser()
        if weights.digest(folder, cache_dir) != newest.manifest.provenance.base:
            raise UserError(f"{folder}: its weights are not those that the run started from; give --base")
        files, delta = ModelFolder(folder), of_run.of_run(newest, folder)
        if found.share:
            _compare_magnitudes(found, newest, files, _until(began + seconds / 2))
        _change(found, delta, files, _until(began + seconds * 3 / 4))
        _factor(found, delta, files, began + seconds)
    except (OSError, ValueError) as error:
        if base is not None and isinstance(error, UserError):
            raise
        found.notes.append(f"What needs the base model is left out: {error}")
    return found


def _steps(run_dir: Path) -> list[Step]:
    """The checkpoints that are valid, by ascending step; damaged ones are left out."""
    found = []
    for name, sha256 in checkpoint.accepted(run_dir, claims.attempts(run_dir)).items():
        with suppress(OSError, ValueError):
            found.append(checkpoint.open_step(run_dir / checkpoint.CHECKPOINTS / name, sha256))
    return sorted(found, key=lambda step: step.number)


Over = Callable[[], bool]


def _until(ends: float) -> Over:
    return lambda: time.monotonic() > ends


def _shuffled(names: Sequence[str], over: Over, found: Weights, what: str) -> Iterator[str]:
    """The names in random order until the time is over, which is noted."""
    names = random.Random(0).sample(sorted(names), len(names))
    for number, name in enumerate(names):
        if over():
            found.notes.append(f"{what}: {number} of {len(names)} matrices; --seconds allows more.")
            return
        yield name


# ---------------------------------------------------------------------------------------------------------------------
# Where the principal weights lie.


def _lie(found: Weights, steps: Sequence[Step], over: Over) -> None:
    oldest, newest = steps[0], steps[-1]
    found.since = oldest.number if oldest is not newest else None
    entries = newest.manifest.parameters
    found.selected = sum(entry.principal for entry in entries.values())
    found.share = {name: entry.principal / int(np.prod(entry.shape)) for name, entry in entries.items()}
    for name in _shuffled([*entries], over, found, "Rows, columns and survival"):
        indices, (height, width) = newest.selected(name), entries[name].shape
        if not indices.numel():
            continue
        found.rows[name] = _densest(torch.bincount(indices // width, minlength=height))
        found.columns[name] = _densest(torch.bincount(indices % width, minlength=width))
        if oldest is not newest and (before := oldest.selected(name)).numel():
            found.survived[name] = float(torch.isin(before, indices, assume_unique=True).double().mean())


def of_selection(principal: PrincipalWeights) -> Weights:
    """Where the principal weights of a model lie while it trains: the same on all ranks. Collective."""
    found = Weights(selected=principal.num_selected)
    for matrix, indices, number in zip(principal.matrices, principal.indices, principal.counts, strict=True):
        height, width = matrix.shape
        found.share[matrix.name] = number / matrix.numel
        rows = torch.bincount(indices // width + matrix.row_bounds[matrix.shard], minlength=height)
        counts = torch.cat([rows, torch.bincount(indices % width, minlength=width)])
        counts = all_reduce_sum(counts.to(matrix.device), principal.shard_group)  # indices may lie on the host
        if number:
            found.rows[matrix.name], found.columns[matrix.name] = map(_densest, counts.split([height, width]))
    return found


def _densest(counts: Tensor) -> float:
    """The share of what is counted that is in the fullest tenth of the places."""
    tenth = max(1, round(len(counts) / 10))
    return float(counts.sort(descending=True).values[:tenth].sum() / counts.sum())


def _compare_magnitudes(found: Weights, step: Step, files: ModelFolder, over: Over) -> None:
    names, parts = step.manifest.snapshot.names, step.manifest.snapshot.parts
    for name in _shuffled([*found.share], over, found, "Overlap with magnitude"):
        indices = step.selected(name)
        if name in names and indices.numel():  # a checkpoint of an older version has no names
            stored = files.read(names[name]).flatten()
            height, width = step.manifest.parameters[name].shape
            matrix = of_run.matrix_in(stored, parts.get(name), height, width).flatten()
            largest = torch.zeros(matrix.numel(), dtype=torch.bool)
            largest[matrix.float().abs().topk(indices.numel()).indices] = True
            found.magnitude[name] = float(largest[indices].double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# How they changed.


def _change(found: Weights, delta: Delta, files: ModelFolder, over: Over) -> None:
    for name in _shuffled(delta.names, over, found, "Updates"):
        weight, difference = _pair(delta, files, name)
        size = difference.norm()
        found.update[name] = float(size / weight.norm())
        if size > 0 and min(difference.shape) > 1:
            largest = torch.svd_lowrank(difference, q=2, niter=8)[1][0]
            found.stable_rank[name] = float(size**2 / largest**2)


def _pair(delta: Delta, files: ModelFolder, name: str) -> tuple[Tensor, Tensor]:
    """``[m, n]`` float32 each: a matrix of the base model, and what training added to it."""
    change, weight = delta.get(name), files.read(name).float()
    assert isinstance(change, Change)
    assert change.base is not None
    difference = torch.zeros(weight.numel())
    difference[change.indices] = change.values.float() - change.base.float()
    columns = weight.shape[-1]  # those of experts in one tensor are below each other
    return weight.view(-1, columns), difference.view(-1, columns)


def _factor(found: Weights, delta: Delta, files: ModelFolder, ends: float) -> None:
    """Of each kind of matrix the one that changed most, the cheapest first, while there is time for the next."""
    largest = {kind_of(name): name for name, _ in sorted(found.update.items(), key=lambda item: item[1])}
    costs = {
        name: min(shape) ** 2 * max(shape) for name in largest.values() if len(shape := files.info(name)["shape"]) == 2
    }
    chosen, rate = sorted(costs, key=costs.__getitem__)[:_FACTORED], 0.0  # seconds for one unit of cost
    for name in chosen:
        began = time.monotonic()
        if began + rate * costs[name] > ends:
            found.notes.append(
                f"Singular values: {len(found.factored)} of {len(chosen)} matrices; --seconds allows more."
            )
            return
        weight, difference = _pair(delta, files, name)
        found.factored.append(factored(name, weight, difference))
        rate = (time.monotonic() - began) / costs[name]


def factored(name: str, weight: Tensor, difference: Tensor) -> Factored:
    """The singular values and vectors of ``weight`` ``[m, n]`` against those of ``difference`` ``[m, n]``."""
    left, base, right = torch.linalg.svd(weight, full_matrices=False)
    after = torch.linalg.svd(weight + difference, full_matrices=False)[0][:, :EXAMINED]
    squares = (left.T @ difference @ right.T).double() ** 2
    captured = squares.cumsum(0).cumsum(1).diagonal() / difference.double().norm() ** 2
    intruders = int(((left.T @ after).abs().amax(dim=0) < COSINE).sum())
    shape = weight.shape[0], weight.shape[1]
    return Factored(name, shape, base.numpy(), torch.linalg.svdvals(difference).numpy(), captured.numpy(), intruders)


# ---------------------------------------------------------------------------------------------------------------------
# Names.


def layer_of(name: str) -> int | None:
    """The layer that a matrix is of: the first number in its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def kind_of(name: str) -> str:
    """What is alike in all layers: the name after the number of the layer. Of experts, whose names have further numbers, all."""
    kind = re.split(r"\.\d+\.", name, maxsplit=1)[-1].removesuffix(".weight")
    return re.sub(r"\.\d+(?=\.|$)", ".*", kind)
