"""MLflow, by its own client: ``MLFLOW_TRACKING_URI`` says where, a server or a database, by default ``mlflow.db`` in the folder
of the command."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from liftdist import schema_tree
from liftdist.training.client import Client, Identity

BATCH = 100  # parameters that MLflow takes at once
LENGTH = 6000  # characters that it takes of each


def start(run_dir: Path, after: int | None) -> Client:
    return Client("mlflow", run_dir, after)


class Run:
    """In the process of the client."""

    def __init__(self, run_dir: Path, identity: Identity) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        found = self._client.search_runs(self._experiments(), f"tags.`liftdist.id` = '{identity.id}'", max_results=1)
        self._is_new = not found
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            made = self._client.create_run(
                self._experiments()[0], tags={"liftdist.id": identity.id}, run_name=run_dir.name
            )
            self._id = made.info.run_id

    def _experiments(self) -> list[str]:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return [given]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "liftdist")
        found = self._client.get_experiment_by_name(name)
        return [found.experiment_id if found else self._client.create_experiment(name)]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w/. :-]", "_", tag), value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics)

    def text(self, tag: str, text: str) -> None:
        from mlflow.entities import Param

        self._client.log_text(self._id, text, f"{tag}.yaml" if tag == "config" else f"{tag}.txt")
        if tag == "config" and self._is_new:  # parameters cannot be changed
            given = schema_tree.leaves(yaml.safe_load(text))
            params = [Param(key, str(value)[:LENGTH]) for key, value in given]
            for first in range(0, len(params), BATCH):
                self._client.log_batch(self._id, params=params[first : first + BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._id)
