"""Several deltas merged into one.

    D_i = values - base values of delta i, 0 at the weights that it leaves alone
    merged values = base values + R(D_1, ..., D_n)        R: see liftdist.deltas.rules

Computed in float64 and then rounded to the dtype that holds the values of all deltas and of the base. A weight whose merged
difference is that of one delta has its value, to the bit. One tensor of all deltas is in memory at a time.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liftdist.deltas import file as delta_file
from liftdist.deltas import of_run
from liftdist.deltas.delta import Change, Delta, bits, by_name, check_same_base, is_plain, no_values
from liftdist.deltas.difference import ITS_BASE, at, on
from liftdist.deltas.export import check_base
from liftdist.errors import UserError
from liftdist.models.weights import ModelFolder
from liftdist.registry import MERGE_RULES
from liftdist.runs import layout

_LIKE_IT = (
    "give a model of the same architecture whose files hold the same tensors, a tied head, too, where the delta has one"
)
SHARES = ("density", "beta", "gamma", "decay")  # options from 0 to 1


@dataclass(frozen=True)
class Aligned:
    """One tensor of n deltas, at the k weights that any of them changes."""

    shape: tuple[int, ...]
    stored: torch.dtype  # dtype in the base model's file
    indices: Tensor  # [k] int64, flat, sorted
    differences: Tensor  # [n, k] float64, 0 where a delta leaves a weight alone
    values: Tensor  # [n, k], the new values, where it does not
    base: Tensor  # [k], the base values in the dtype that holds all values


def merged(
    deltas: Sequence[Delta],
    rule: str,
    options: Mapping[str, Any],
    location: Path,
    base: ModelFolder | None = None,
    onto: tuple[ModelFolder, str] | None = None,
    copies: Mapping[str, Sequence[str]] | None = None,
) -> Delta:
    """The delta that ``deltas`` of one base model become by a rule of :data:`liftdist.registry.MERGE_RULES`.

    Args:
        options: of the rule; ``weights``, one for each delta, are 1 unless they are given.
        location: names the result in messages.
        base: the base model, for deltas without base values.
        onto: another base model of the same architecture and its digest, which the merged differences are added to.
        copies: tensors of ``onto`` that must stay equal to one, see :class:`liftdist.models.names.NameMap`.

    Raises:
        UserError: the rule refuses an option or lacks one, the deltas are of different base models, one holds no base values and
            there is no ``base``, or (when it is read) a tensor is none of floating-point numbers, or ``onto`` has no such tensor.
    """
    check_same_base(*deltas)
    combine = MERGE_RULES.load(rule).merge
    given = _options(rule, combine, options, len(deltas))
    combine(torch.zeros(len(deltas), 0, dtype=torch.float64), **given)
    source = {name: name for name in names(deltas)}  # what is merged for each tensor of the result
    for group in ((stored, *others) for stored, others in (copies or {}).items()):
        if changed := [name for name in group if name in source]:
            source |= {name: changed[0] for name in group if name not in source}

    def get(name: str) -> Change:
        found = aligned(source[name], deltas, base)
        before, stored = found.base, found.stored
        if onto is not None:
            before = at(onto[0], name, found.shape, found.indices, "the delta is", _LIKE_IT)
            stored = before.dtype
        before = before.to(torch.promote_types(found.base.dtype, stored))
        difference = combine(found.differences, **given)
        after = (before.double() + difference).to(before.dtype)
        if onto is None:
            for own, value in zip(found.differences, found.values, strict=True):
                after = torch.where((own == difference) & (own != 0), value, after)
        changed = bits(before) != bits(after)
        return Change(found.shape, stored, found.indices[changed], after[changed], before[changed])

    record = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in given.items()}
    return Delta(
        location,
        deltas[0].base_digest if onto is None else onto[1],
        sorted(source),
        get,
        next((delta.origin for delta in deltas if delta.origin), {}) if onto is None else {},
        made={"merge": rule, **record, "deltas": [of(delta) for delta in deltas]}
        | ({} if onto is None else {"moved_from": deltas[0].base_digest}),
    )


def read(paths: Sequence[Path], base: Path | None, cache_dir: Path) -> list[Delta]:
    """The deltas of files, and those of all checkpoints of run directories.

    Raises:
        UserError: one cannot be read, they are of different base models, or ``base`` is not theirs.
    """
    found: list[Delta] = []
    for path in paths:
        if path.is_dir():
            layout.check_run(path)
            of_steps, folder = of_run.of_checkpoints(path, base)
            check_base(folder, of_steps[-1], cache_dir)
            found += of_steps
        else:
            found.append(delta_file.read(path))
    try:
        check_same_base(*found)
    except UserError as error:
        raise UserError(
            f"{error}; if one was trained with the other applied, `liftdist diff BASE FOLDER` makes one of both"
        ) from None
    if base is not None:
        check_base(base, found[0], cache_dir)
        stored = ModelFolder(base)
        found = [on(delta, stored) if delta.compressed else delta for delta in found]
    return found


def _options(rule: str, combine: Any, options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The keywords of a rule from the options that were given. Raises ``UserError`` for one unknown, missing or out of range."""
    known = {key: p.default for key, p in inspect.signature(combine).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if unused := [key for key in options if key not in known]:
        takes = ", ".join(f"--{key}" for key in known)
        raise UserError(f"--{unused[0]}: --rule {rule} has no such option; it takes {takes}")
    for key, value in options.items():
        if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
            raise UserError(f"--{key}: must be finite")
    if "weights" in known:
        weights = options.get("weights", [1.0] * count)
        if len(weights) != count:
            raise UserError(f"--weights: has {len(weights)} weights for {count} deltas; give one for each")
        options = {**options, "weights": torch.tensor(weights, dtype=torch.float64)}
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise UserError(f"--rule {rule}: needs --{key}")
    for key in SHARES:
        if not 0 <= options.get(key, 1) <= 1 or (key == "density" and options.get(key) == 0):
            raise UserError(f"--{key} {options[key]:g}: must be from 0 to 1{', and not 0' if key == 'density' else ''}")
    return {key: options.get(key, default) for key, default in known.items()}


def title(delta: Delta) -> str:
    """What tells a delta from others: its file, or run and step."""
    return (
        f"{delta.made['run']}/{delta.location.name}"
        if delta.location.is_dir() and "run" in delta.made
        else delta.location.name
    )


def of(delta: Delta) -> dict[str, str]:
    """What a result says of a delta that it was made from."""
    return {"name": title(delta), "sha256": delta.sha256}


def names(deltas: Iterable[Delta]) -> list[str]:
    """The tensors that any of the deltas changes."""
    return sorted({name for delta in deltas for name in delta.names})


def aligned(name: str, deltas: Sequence[Delta], base: ModelFolder | None = None) -> Aligned:
    """A tensor of several deltas at the weights that any of them changes. Raises ``UserError`` as :func:`merged`."""
    changes = [_valued(name, delta) for delta in deltas]
    held = [change for change in changes if change is not None]
    dtype = functools.reduce(torch.promote_types, (change.values.dtype for change in held))
    if not is_plain(dtype):
        raise UserError(
            f"{name} holds {str(dtype).removeprefix('torch.')}; only weights in floating-point of 16 bits or more can be merged"
        )
    any_changed = torch.zeros(torch.Size(held[0].shape), dtype=torch.bool).flatten()
    for each in held:
        any_changed[each.indices] = True
    indices = any_changed.nonzero().squeeze(1)
    before = torch.zeros(len(indices), dtype=dtype)
    if base is not None:
        before = at(base, name, held[0].shape, indices, "the delta is", ITS_BASE).to(dtype)
    differences = torch.zeros(len(deltas), len(indices), dtype=torch.float64)
    values = torch.zeros(len(deltas), len(indices), dtype=dtype)
    for delta, change, row, value in zip(deltas, changes, differences, values, strict=True):
        if change is None:
            continue
        places = torch.searchsorted(indices, change.indices)
        if base is None:
            if change.base is None:
                raise UserError(f"{delta.location}: holds no base values, to which differences are taken; give --base")
            before[places] = change.base.to(dtype)
        value[places] = change.values.to(dtype)
        row[places] = change.values.double() - before[places].double()
    return Aligned(held[0].shape, held[0].stored, indices, differences, values, before)


def _valued(name: str, delta: Delta) -> Change | None:
    change = by_name(name, delta)
    if change is not None and not isinstance(change, Change):
        raise no_values(delta)
    return change
