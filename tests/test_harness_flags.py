"""The flags by which `liftdist eval` asks the lm-evaluation-harness; that need not be installed for them to be checked."""

import sys

import commands
import pytest
from commands import ROOT


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--harness", " , "], "--harness: names no task"),
        (["--harness-limit", 5], "--harness-limit=5: is only used with --harness"),
        (["--harness", "said", "--harness-limit", 0], "--harness-limit must be at least 1, got 0"),
        (["--harness", "said", "--harness-path", "/absent"], "--harness-path /absent: no such folder"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words, problem, tmp_path):
    code, said = commands.call("eval", tmp_path / "config.yaml", *words)
    assert code == 2
    assert problem in said
    assert len(said.splitlines()) == 1


def test_what_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "lm_eval").mkdir()  # a folder of results, say
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT)])
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    code, said = commands.call("eval", tmp_path / "config.yaml", "--harness", "gsm8k")
    assert code == 2
    assert said.strip() == "liftdist: --harness: needs the lm-evaluation-harness: pip install 'liftdist[harness]'"
