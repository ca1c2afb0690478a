"""Some decoder layers, whole; drawn anew at each refresh.

L = `layers` of the decoder layers, uniformly at random        (LISA, arXiv 2403.17919, which also trains embedding and head)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from liftdist.errors import UserError


@dataclass(frozen=True)
class Layers:
    """
    Args:
        layers: how many.
        seed: another seed draws others.
    """

    layers: int
    seed: int = 0
    redraws: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]], refreshes: int = 0) -> dict[str, int]:
        """All weights of a matrix, or none, by name. Raises ``UserError`` if there are fewer layers than that."""
        every = layers_of(shapes, self.layers)
        drawn = np.random.default_rng([self.seed, refreshes]).permutation(len(every))[: self.layers]
        chosen = {every[place] for place in drawn}
        return {name: m * n if layer_of(name) in chosen else 0 for name, (m, n) in shapes.items()}


def layer_of(name: str) -> str:
    """The layer of a matrix, as ``model.layers.3``; empty outside of layers."""
    found = re.match(r".*?\.\d+(?=\.)", f".{name}")
    return found[0].removeprefix(".") if found else ""


def layers_of(names: Iterable[str], wanted: int) -> list[str]:
    """The layers of matrices, in order. Raises ``UserError`` if there are fewer than ``wanted``."""
    every = sorted({layer for name in names if (layer := layer_of(name))}, key=lambda layer: (len(layer), layer))
    if wanted > len(every):
        raise UserError(
            f"selection.layers: must be at most {len(every)}, the layers with trained matrices, got {wanted}"
        )
    return every


def make(settings: Any) -> Layers:
    """From the settings ``layers`` and ``seed``."""
    return Layers(settings.layers, settings.seed or 0)
