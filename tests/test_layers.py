"""The imports between modules run in one direction, and what must start fast imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "liftdist"

#: what a module may import of the package, besides config
ALLOWED = {
    "schema": set(),
    "config": {"schema"},
    "records": set(),
    "files": set(),
    "rundir": {"files"},
    "failures": set(),
    "changes": {"rundir"},
    "data": {"records"},
    "metrics": {"files", "rundir"},
    "lowrank": set(),
    "preflight": {"records", "rundir"},
    "mesh": set(),
    "signals": {"failures", "files", "mesh", "rundir"},
    "matrices": {"mesh"},
    "selection": {"matrices", "mesh"},
    "reductions": {"mesh"},
    "slots": {"matrices", "reductions"},
    "principal": {"lowrank", "matrices", "mesh", "reductions", "selection", "slots"},
    "weights": {"files", "mesh", "preflight"},
    "model": {"mesh", "preflight", "weights"},
    "checkpoint": {"files", "matrices", "mesh", "rundir"},
    "saver": {"checkpoint", "files", "matrices", "mesh", "rundir", "weights"},
    "delta": {"checkpoint", "files", "mesh", "weights"},
    "export": {"checkpoint", "delta", "files", "mesh", "preflight", "rundir", "weights"},
    "loss": {"data"},
    "kernels": set(),
    "adamw": {"kernels", "principal"},
    "trainer": {"adamw", "data", "loss", "mesh", "metrics", "principal"},
    "prepare": {
        "data", "files", "loss", "matrices", "mesh", "metrics", "model", "preflight", "principal", "selection",
        "signals", "trainer", "weights",
    },
    "train": {
        "changes", "checkpoint", "delta", "export", "failures", "files", "mesh", "metrics", "preflight", "prepare", "principal",
        "rundir", "saver", "signals", "trainer", "weights",
    },
    "network": set(),
    "scheduler": set(),
    "memory": {"mesh"},
    "footprint": {"loss", "lowrank", "matrices", "memory", "mesh", "model"},
    "plan": {"footprint", "lowrank", "model", "selection"},
    "launcher": {"changes", "failures", "files", "network", "rundir", "scheduler"},
    "history": {"files", "rundir"},
    "health": {"network", "rundir"},
    "job": {
        "changes", "failures", "files", "health", "history", "launcher", "network", "preflight", "rundir", "scheduler",
    },
    "submit": {"changes", "files", "history", "job", "plan", "preflight", "rundir", "scheduler"},
    "cli": {
        "changes", "delta", "export", "launcher", "metrics", "model", "plan", "preflight", "prepare", "rundir",
        "submit", "weights",
    },
}  # fmt: skip


def imported(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "liftdist":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liftdist."):
            found.add(node.module.split(".")[1])
    return found & {path.stem for path in PACKAGE.glob("*.py")}


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_run_downward(module):
    assert imported(module) <= ALLOWED[module] | {"config"}


@pytest.mark.parametrize("module", ["cli", "config", "data", "job", "signals"])
def test_starts_without_torch(module):
    code = f"import sys, liftdist.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
