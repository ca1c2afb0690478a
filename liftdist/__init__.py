"""LIFT, Low-rank Informed Sparse Fine-Tuning, distributed over GPUs and nodes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liftdist.engine.principal import PrincipalWeights

__all__ = ["PrincipalWeights"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "PrincipalWeights":  # imported on first use: ``liftdist --help`` runs without torch
        from liftdist.engine.principal import PrincipalWeights

        return PrincipalWeights
    raise AttributeError(name)
