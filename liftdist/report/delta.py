"""What a delta is: of which base model, made by what, and where its changes lie.

share    of the weights of the tensors that it changes, the part that it changes
norm     Frobenius norm of the differences to the base values, if the delta holds them; of a compressed one that does not hold all
         of the original, before they are rounded
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from liftdist.deltas.delta import Change, Delta
from liftdist.deltas.difference import Difference
from liftdist.report.weights import kind_of, layer_of
from liftdist.training.marked import visible

Figures = dict[str, Any]


def figures(delta: Delta) -> Figures:
    """Everything that is known of a delta, as JSON holds it: of the whole, of each kind of matrix, layer and tensor."""
    tensors, dtypes, has_base = {}, set(), True
    for name in delta.names:
        change = delta.get(name)
        has_base &= change.undoable
        dtypes.add(str(change.dtype).removeprefix("torch."))
        norm = _norm(change)
        tensors[name] = _figures(1, change.indices.numel(), math.prod(change.shape), norm)
    kinds: dict[str, list[Figures]] = {}
    layers: dict[str, list[Figures]] = {}
    for name, found in tensors.items():
        layer = layer_of(name)
        kinds.setdefault(kind_of(name), []).append(found)
        layers.setdefault("outside" if layer is None else str(layer), []).append(found)
    return {
        "delta": str(delta.location),
        "sha256": delta.sha256,
        **delta.about(),
        "dtypes": sorted(dtypes),
        "base_values": has_base,
        "compressed": delta.compressed,
        "all": _sum(tensors.values()),
        "kinds": {kind: _sum(kinds[kind]) for kind in sorted(kinds)},
        "layers": {layer: _sum(layers[layer]) for layer in sorted(layers, key=lambda layer: (len(layer), layer))},
        "tensors": tensors,
    }


def _norm(change: Change | Difference) -> float | None:
    if isinstance(change, Difference):  # what an exact one adds depends on the base model
        return None if change.corrections is None else change.steps.double().norm().item()
    return None if change.base is None else (change.values.double() - change.base.double()).norm().item()


def _figures(tensors: int, changed: int, weights: int, norm: float | None) -> Figures:
    return {
        "tensors": tensors,
        "changed": changed,
        "weights": weights,
        "share": changed / max(weights, 1),
        "norm": norm,
    }


def _sum(parts: Iterable[Figures]) -> Figures:
    parts = list(parts)
    tensors, changed, weights = (sum(part[key] for part in parts) for key in ("tensors", "changed", "weights"))
    norms = [part["norm"] for part in parts]
    return _figures(tensors, changed, weights, None if None in norms else math.hypot(*norms))


def lines(found: Figures) -> list[str]:
    """:func:`figures` as a text; those of single tensors are left out."""
    origin = f"{found['base_model']}@{found['base_commit']}, " if "base_model" in found else ""
    base_values = f"{'with' if found['base_values'] else 'without'} base values"
    if found["compressed"]:
        base_values = "compressed, " + ("not all of the original" if found["made"]["lossy"] else "all of the original")
    text = [
        f"{found['delta']}: {', '.join(found['dtypes']) or 'no changes'}, {base_values}",
        f"base model: {origin}digest {found['base_digest'][:12]}",
        f"made by: {_made(found.get('made', {}))}",
    ]
    width = max(map(len, ("outside", *found["kinds"])))
    for title, parts in (("kind", found["kinds"]), ("layer", found["layers"]), ("", {"all": found["all"]})):
        if title:
            text += ["", f"{title:{width}}  tensors        changed    share       norm"]
        for part, one in parts.items():
            norm = "-" if one["norm"] is None else f"{one['norm']:.4g}"
            text.append(f"{part:{width}}  {one['tensors']:>7}  {one['changed']:>13,}  {one['share']:>7.2%}  {norm:>9}")
    return [visible(line) for line in text]


def _made(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in made.items()) or "not recorded"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(
            str(entry["name"]) if isinstance(entry, dict) and "name" in entry else str(entry) for entry in value
        )
    return str(value)
