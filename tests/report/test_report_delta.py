"""What is said of a delta, against its tensors."""

import json
import math
from pathlib import Path

import pytest
import torch
from commands import liftdist

from liftdist.deltas import file as delta_file
from liftdist.deltas.delta import Change, Delta

NAMES = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "lm_head.weight",
)


def write(path, made, with_base=True):
    """Of each of four tensors of 50 weights, one weight more than of the one before."""

    def get(name):
        count = NAMES.index(name) + 1
        return Change((5, 10), torch.bfloat16, torch.arange(count), torch.full((count,), 2.0), torch.zeros(count))

    origin = {"base_model": "some/model", "base_commit": "c0ffee"}
    delta_file.write(Delta(path, "ab" * 32, list(NAMES), get, origin, made=made), path, with_base)
    return path


def test_where_a_delta_lies(tmp_path):
    path = write(tmp_path / "x.delta", {"run": "mi\x1b[2Jne", "step": 8})
    found = json.loads(liftdist("show", path, "--json"))
    assert found["all"] == dict(tensors=4, changed=10, weights=200, share=0.05, norm=pytest.approx(2 * math.sqrt(10)))
    assert found["tensors"]["lm_head.weight"]["changed"] == 4
    assert found["kinds"]["mlp.up_proj"] == dict(
        tensors=2, changed=3, weights=100, share=0.03, norm=pytest.approx(2 * math.sqrt(3))
    )
    assert {layer: part["changed"] for layer, part in found["layers"].items()} == {"0": 1, "10": 5, "outside": 4}
    assert found["sha256"] == delta_file.read(path).sha256
    said = liftdist("show", path)
    assert f"{path}: float32, with base values" in said
    assert "base model: some/model@c0ffee, digest abababababab" in said
    assert "made by: run mi\\x1b[2Jne, step 8" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["mlp.up_proj", "2", "3", "3.00%", "3.464"] in rows
    assert [row[0] for row in rows[3:] if row] == [
        "kind", "lm_head", "mlp.up_proj", "self_attn.q_proj", "layer", "0", "10", "outside", "all",
    ]  # fmt: skip


def test_what_is_not_known_is_not_said(tmp_path):
    path = write(tmp_path / "x.delta", {}, with_base=False)
    found = json.loads(liftdist("show", path, "--json"))
    assert (found["all"]["norm"], found["base_values"], "made" in found) == (None, False, False)
    said = liftdist("show", path)
    assert "without base values" in said
    assert "made by: not recorded" in said
    assert f"{path}.none" in liftdist("show", Path(f"{path}.none"), code=2)


def test_a_delta_may_change_nothing(tmp_path):
    delta_file.write(Delta(tmp_path / "none", "ab" * 32, [], lambda name: None), tmp_path / "none")
    assert "no changes" in liftdist("show", tmp_path / "none")


def test_a_merged_delta_says_of_what(tmp_path):
    one, two = (write(tmp_path / name, {}) for name in ("one", "two"))
    liftdist("merge", one, two, "--rule", "ties", "--density", "0.5", "--output", tmp_path / "both")
    assert "made by: merge ties, weights 1.0 1.0, density 0.5, deltas one two" in liftdist("show", tmp_path / "both")
