"""Benchmarks run, and write what they measured."""

import json
import subprocess
import sys

import pytest
from commands import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "step --rounds 1 --rows 1 --length 8",
        "memory --rows 1 --length 8",
        "traffic --length 8",
        "load --rounds 1",
        "checkpoint --rounds 1",
        "routing --examples 2 --questions 2",
        "compare --rounds 1 --steps 1 --rows 1 --length 8",
        "apply --rounds 1 --files 2 --gib 0.1",
        "export --rounds 1",
    ],
    ids=lambda words: words.split()[0],
)
def test_a_benchmark_runs(words, tiny_model, tmp_path):
    command = [sys.executable, "-m", "bench", *words.split(), "--out", tmp_path / "out.json"]
    command += ["--folder", tmp_path] if "apply" in words else ["--model", tiny_model]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"device", "torch"} < set(json.loads((tmp_path / "out.json").read_text()))
