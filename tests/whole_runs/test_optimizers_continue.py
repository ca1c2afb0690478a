"""Runs with each optimizer: continued to the bit on the same ranks, loaded to the bit on others and trained on there."""

from pathlib import Path

import builders
import pytest
import ranks

BF16, BASE = dict(dtype="bfloat16"), dict(weight_decay=0.1, decay_towards="base")
CASES = {
    "sgd": dict(name="sgd"),
    "sgd without momentum": dict(name="sgd", momentum=0.0),
    "sgd, bfloat16": dict(name="sgd", **BF16),
    "sgd to base, bfloat16": dict(name="sgd", **BASE, **BF16),
    "adamw to base, bfloat16": BASE | BF16,
    "adamw by entry, to base": dict(bias_correction="entry", **BASE),
}


def config_of(case, model, records, folder):
    settings = {key: dict(values) for key, values in builders.SETTINGS.items()}
    settings["optimizer"] |= CASES[case]
    return builders.config(model, records, folder / case, model=dict(dtype="bfloat16"), **settings)


def all_saved(mesh, configs):
    return [builders.save_and_go_on(mesh, config) for config in configs]


def all_loaded(mesh, configs):
    """The state that each checkpoint gives on these ranks, and the losses of some steps from there. Collective."""
    found = []
    for config in configs:
        run_dir = Path(config.run_dir)
        made = builders.trainer(mesh, config, builders.newest(mesh, run_dir, builders.accepted_in(run_dir)))
        loaded = builders.global_digest(made)
        found.append((loaded, [made.run_step()["train/loss"] for _ in range(builders.AFTER)]))
    return found


def test_each_optimizer_continues(tiny_model, records, tmp_path):
    configs = [config_of(case, tiny_model, records, tmp_path) for case in CASES]
    saved, loaded = ranks.run(2, all_saved, configs)[0], ranks.run(3, all_loaded, configs)[0]
    assert len({straight[2] for straight, _ in saved}) == len(CASES)  # no two settings do the same
    for case, (straight, resumed), (digest, losses) in zip(CASES, saved, loaded, strict=True):
        assert straight == resumed, case
        assert digest == straight[0], case
        assert losses == pytest.approx(straight[1], rel=2e-2), case  # sums over other ranks round otherwise
