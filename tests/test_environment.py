"""The table of environment variables: typed, and the only place that names them."""

import ast
from pathlib import Path

import pytest

from liftdist import environment
from liftdist.environment import Variable
from liftdist.errors import UserError

PACKAGE = Path(environment.__file__).parent


def test_values_have_their_types(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LIFTDIST_NODES", "a b ")
    monkeypatch.setenv("LIFTDIST_COMMAND", '["liftdist", "a b"]')
    monkeypatch.setenv("LIFTDIST_LEAD", "")
    assert environment.RANK.get(0) == 3
    assert environment.NODES.need() == ["a", "b"]
    assert environment.COMMAND.get([]) == ["liftdist", "a b"]
    assert environment.LEAD.get(7.5) == 7.5  # empty is unset
    assert environment.RANK.get(0, {}) == 0
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UserError, match="environment variable RANK='three': is not of the form that torchrun gives it"):
        environment.RANK.get(0)
    with pytest.raises(UserError, match=r"SLURM_NODEID is not set; SLURM sets it \(number of this node in the step\)"):
        environment.SLURM_NODEID.need({})


def test_names_of_jobs():
    plain = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
    assert environment.this_job(plain) == ("12", "2.0")
    task = plain | {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "0", "LIFTDIST_TRY": "1"}
    assert environment.this_job(task) == ("11_0", "2.1")


def test_every_variable_stands_once_and_is_explained():
    table = list(environment.table())
    assert len({variable.name for variable in table}) == len(table) > 30
    assert all(variable.meaning and variable.by for variable in table)
    assert all(isinstance(variable, Variable) for variable in table)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_spells_a_variable_of_ours(path):
    if path.name == "environment.py":
        return
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    names = {variable.name for variable in environment.table()}
    assert not names & {text for text in texts if isinstance(text, str)}
