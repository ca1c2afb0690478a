"""Losses, one per file: ``make(settings)`` returns a :class:`Loss`. Must not know models or chunks.

:data:`liftdist.registry.LOSSES` lists them. Whatever is trained with, the held-out loss is plain cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liftdist.models.head import PerToken
    from liftdist.training.losses.masked_thought import Masking


@dataclass(frozen=True)
class Loss:
    """What training minimises of each labelled token, and what it needs for that."""

    per_token: PerToken  # logits [T, V], labels [T] -> [T] float32, zero where the label is IGNORED
    needs_base: bool = False  # whether it takes the base model's logits [T, V] as a third argument
    masking: Masking | None = None  # what replaces tokens of the input
