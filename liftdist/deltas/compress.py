"""A delta written smaller: see :data:`liftdist.registry.COMPRESSIONS` for how, :mod:`liftdist.deltas.compressed` for the file.

One tensor is in memory at a time. What is printed of a tensor is measured on what the file gives back.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from liftdist import files, safetensors_io
from liftdist.deltas import compressed
from liftdist.deltas import delta as deltas
from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, Delta, is_plain
from liftdist.deltas.difference import squared_error
from liftdist.errors import UserError
from liftdist.registry import COMPRESSIONS


def compress(delta: Delta, method: str, options: Mapping[str, float], path: Path, say: Callable[[str], None]) -> None:
    """Write ``delta``, whose changes hold base values, compressed by a method of :data:`liftdist.registry.COMPRESSIONS`.

    Args:
        options: of the method.
        say: is given the lines of a table: error and size of each tensor.

    Raises:
        UserError: the method lacks an option or refuses one; the delta holds no base values, or, for a method that is not exact,
            other numbers than floating-point ones of 16 bits or more; ``path`` exists or cannot be written.
    """
    plan = COMPRESSIONS.load(method).plan
    _check_options(method, plan, options)
    is_exact = method == "exact"

    def changes() -> Iterator[tuple[str, Change]]:
        for name, change in deltas.changed(delta):
            if change.base is None:
                raise UserError(f"{delta.location}: holds no base values, from which changes are told; give --base")
            if not is_exact and not is_plain(change.values.dtype):
                raise UserError(f"{name} holds {str(change.values.dtype).removeprefix('torch.')}; take --method exact")
            yield name, change

    code = plan(changes, **options)
    about: dict[str, Any] = {}
    norms, errors = [0.0], [0.0]
    width = max(map(len, (*delta.names, "tensor")))
    with files.disk_errors(path):
        spool = safetensors_io.Spool(path.parent)
    say(f"{'tensor':{width}}  {'weights':>13}  {'kept':>13}  {'bytes':>13}  {'error':>7}")
    with spool as tensors:
        for name, change in changes():
            found, scale = code(name, change)
            parts: dict[str, Tensor] = {}
            if found.indices.numel():
                parts, about[name] = compressed.pack(name, found, scale)
            with files.disk_errors(path):
                for part, tensor in parts.items():
                    tensors.add(part, tensor)
            assert change.base is not None
            norms.append((change.values.double() - change.base.double()).norm().item())
            errors.append(math.sqrt(squared_error(change, found)))
            counts = (change.indices.numel(), found.indices.numel(), sum(tensor.nbytes for tensor in parts.values()))
            say(f"{name:{width}}  {'  '.join(f'{count:>13,}' for count in counts)}  {_share(errors[-1], norms[-1])}")
        kept = {**delta.made, "compressed": method, **options, "lossy": not is_exact, "original": delta.sha256}
        made = replace(delta, made=kept)
        delta_file.save(tensors, path, delta_file.description(made, compressed.FORMAT, about, tensors))
    before, after = delta.location.stat().st_size, path.stat().st_size
    say(
        f"{before:,} bytes before, {after:,} after ({after / before:.3f}); "
        f"error {_share(math.hypot(*errors), math.hypot(*norms)).strip()}"
    )


def _check_options(method: str, plan: Callable[..., Any], options: Mapping[str, float]) -> None:
    takes = [key for key, p in inspect.signature(plan).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unused := [key for key in options if key not in takes]:
        raise UserError(
            f"--{unused[0]}: --method {method} has no such option; it takes "
            + (", ".join(f"--{key}" for key in takes) or "none")
        )
    if missing := [key for key in takes if key not in options]:
        raise UserError(f"--method {method}: needs --{missing[0]}")


def _share(error: float, norm: float) -> str:
    """``||tau - tau'||_2 / ||tau||_2``."""
    return f"{error / norm if norm else 0.0:>7.4f}"
