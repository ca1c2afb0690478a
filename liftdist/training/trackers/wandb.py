"""Weights & Biases, by its own client, which the variables ``WANDB_*`` configure; ``WANDB_MODE=offline`` writes files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from liftdist.training.client import Client, Identity


def start(run_dir: Path, after: int | None) -> Client:
    return Client("wandb", run_dir, after)


class Run:
    """In the process of the client."""

    def __init__(self, run_dir: Path, identity: Identity) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "liftdist"),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=identity.id,
            resume="allow",
            dir=run_dir,
            settings=wandb.Settings(console="off"),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, tag: str, text: str) -> None:
        if tag == "config":
            self._run.config.update(yaml.safe_load(text), allow_val_change=True)
        else:
            self._run.summary[tag] = text

    def close(self) -> None:
        self._run.finish()
