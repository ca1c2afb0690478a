"""What every part of a run on one rank shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from liftdist.console import Console
from liftdist.distributed.mesh import Mesh
from liftdist.runs.stop import CancellationPoint
from liftdist.schema import Config


@dataclass(frozen=True, eq=False)
class RunContext:
    """Created at the entry point and passed down; its fields are not reassigned during a run. Equal to itself alone."""

    config: Config
    mesh: Mesh
    console: Console
    cancellation: CancellationPoint = field(default_factory=CancellationPoint)
    shares_model: bool = False  # with other runs, in turn: the method can leave it as it was
