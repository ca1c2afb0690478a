"""Trackio, by its own client, which the variables ``TRACKIO_*`` configure; by default all stays on this machine.

Trackio knows a run by its name, which is therefore that of the run directory and a part of the run's identity.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from liftdist.training.client import Client, Identity


def start(run_dir: Path, after: int | None) -> Client:
    return Client("trackio", run_dir, after)


class Run:
    """In the process of the client."""

    def __init__(self, run_dir: Path, identity: Identity) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "liftdist"),
            name=f"{run_dir.name}-{identity.id[:8]}",
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, tag: str, text: str) -> None:
        """Only the config, which goes with the first metrics: Trackio has no place for other texts."""
        if tag == "config":
            self._run.config.update(yaml.safe_load(text))

    def close(self) -> None:
        self._run.finish()
