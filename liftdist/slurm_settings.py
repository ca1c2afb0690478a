"""The settings of jobs: what ``liftdist submit`` asks SLURM for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liftdist.schema_tree import NOTHING, setting


def _slurm(default: Any, help: str, **bounds: Any) -> Any:
    return setting(default, help, changes=NOTHING, taken_by="SLURM", **bounds)


# names, lists of nodes, times and options as SLURM accepts them: no other text is passed to its commands
NAME = r"[A-Za-z0-9_@+.,][A-Za-z0-9_@+.,-]*"
GROUP = r"[A-Za-z0-9_@+.,/:=%][A-Za-z0-9_@+.,/:=%-]*"  # partitions, accounts: sites name them as they like
NODES = r"[A-Za-z0-9_.,/\[\]][A-Za-z0-9_.,/\[\]-]*"  # with a slash, a file of them
TIME = r"\d+|\d+(:\d{1,2}){1,2}|\d+-\d+(:\d{1,2}){0,2}|(?i:unlimited|infinite)"
# in one line; --wrap, also cut short, would take the place of the script
OPTION = r"--(?!wr(a|ap)?(=|$))[a-z][a-z0-9-]*(=[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]*)?"


@dataclass
class SlurmConfig:
    nodes: int = _slurm(1, "nodes of a job", at_least=1)
    gpus_per_node: int | None = _slurm(None, "GPUs to request per node, with one rank each", at_least=1)
    ranks_per_node: int | None = _slurm(None, "ranks per node, if not one per GPU", at_least=1)
    cpus_per_task: int | None = _slurm(None, "CPUs to request per node, for all its ranks", at_least=1)
    time: str | None = _slurm(None, "time limit in SLURM's format: `12:00:00`, `2-00:00:00`, or minutes", pattern=TIME)
    partition: str | None = _slurm(None, "partition", pattern=GROUP)
    account: str | None = _slurm(None, "account", pattern=GROUP)
    qos: str | None = _slurm(None, "quality of service", pattern=GROUP)
    exclude: str | None = _slurm(None, "nodes to exclude", pattern=NODES)
    options: list[str] = _slurm(
        [], "further options for sbatch, each as `--name=value`", pattern=OPTION, example='["--mail-type=END"]'
    )
    container: str | None = _slurm(None, "container image to run in")
    container_runtime: str = _slurm("pyxis", "runtime of the container", choices=("pyxis", "apptainer"))
    container_mounts: list[str] = _slurm(
        [], "folders to mount, besides the current one and the home folder", example="[/scratch]"
    )
    signal_lead: int = _slurm(
        300, "seconds before the time limit at which the run is told to save and stop", at_least=10
    )
    gpu_memory: float | None = _slurm(
        None, "memory of a GPU in GiB; a run that does not fit, by `liftdist plan`, is not submitted", above=0
    )
    max_restarts: int = _slurm(1, "consecutive restarts of crashed ranks without a new checkpoint", at_least=0)
    max_requeues: int = _slurm(100, "requeues of a job after a preemption, a time limit or a lost node", at_least=0)
