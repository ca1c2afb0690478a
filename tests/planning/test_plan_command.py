"""What the command ``liftdist plan`` is handed: lines, and whether the run fits."""

import argparse

import builders
import pytest
from commands import call, write_config

from liftdist.planning import plan


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_config(tmp_path, tiny_model, builders.write_records(tmp_path / "records.jsonl"))


def options(config, **given):
    defaults = dict(overrides=[], nodes=1, gpus_per_node=1, gpu=None, gpu_memory=None, link_gbps=100.0, json=False)
    return argparse.Namespace(config=config, **defaults | given)


@pytest.mark.parametrize(("memory", "fits"), [(None, True), (80.0, True), (0.001, False)])
def test_a_plan_is_returned_and_ends_no_process(memory, fits, config):
    lines, verdict = plan.run(options(config, gpu_memory=memory))
    said = list(lines)
    assert verdict is fits
    assert said[0] == "1 x 1 ranks: 1 replicas of 1 shards"
    assert any(line.startswith("does not fit: ") for line in said) is not fits


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_exit_code_says_whether_it_fits(form, config):
    codes = [call("plan", config, "--gpus-per-node=1", f"--gpu-memory={gib}", *form)[0] for gib in (80, 0.001)]
    assert codes == [0, 1]
