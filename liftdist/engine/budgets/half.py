"""Half of the matrices, whole; drawn anew at each refresh.

of each module with g matrices floor(g / 2) are trained, of an odd number one more in half of the modules, at random
                                                                                            (HFT, arXiv 2404.18466)
HFT counts the matrices of attention and of the MLP of a layer, as is done here: 2 of q, k, v, o; 1 or 2 of gate, up, down.
Each expert is a module of its own. A stage of HFT is the time between two refreshes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Half:
    """
    Args:
        seed: another seed draws other matrices.
    """

    seed: int = 0
    redraws: ClassVar[bool] = True

    def allot(self, shapes: Mapping[str, tuple[int, int]], refreshes: int = 0) -> dict[str, int]:
        """All weights of a matrix, or none, by name."""
        random = np.random.default_rng([self.seed, refreshes])
        modules: dict[str, list[str]] = {}
        for name in sorted(shapes):
            modules.setdefault(name.removesuffix(".weight").rpartition(".")[0], []).append(name)
        odd = [module for module, names in modules.items() if len(names) % 2]
        more = {odd[place] for place in random.permutation(len(odd))[: len(odd) // 2]}
        counts = dict.fromkeys(shapes, 0)
        for module, names in modules.items():
            number = len(names) // 2 + (module in more)
            for place in random.permutation(len(names))[:number]:
                m, n = shapes[names[place]]
                counts[names[place]] = m * n
        return counts


def make(settings: Any) -> Half:
    """From the setting ``seed``."""
    return Half(settings.seed or 0)
