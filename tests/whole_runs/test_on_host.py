"""Runs whose values are on the host: the same as others to the bit, and each continues the other."""

import builders
import ranks
import torch
from commands import run_command, write_config


def config_of(model, records, folder, device):
    settings = {key: dict(values) for key, values in builders.SETTINGS.items()}
    settings["optimizer"]["device"] = device
    return builders.config(model, records, folder, model=dict(dtype="bfloat16"), **settings)


def one_after_the_other(mesh, first, second):
    """Losses and state some steps after a save: in one go, and from there with each of two settings. Collective."""

    def go_on(made):
        return [made.run_step()["train/loss"] for _ in range(builders.AFTER)], builders.global_digest(made)

    found = *builders.stop_and_continue(mesh, first, builders.BEFORE, go_on), builders.continued(mesh, second, go_on)
    return list(found)


def test_runs_continue_with_their_values_on_another_device(tiny_model, records, tmp_path):
    pairs = [
        [config_of(tiny_model, records, tmp_path / folder, device) for device in devices]
        for folder, devices in (("here", (None, "cpu")), ("host", ("cpu", None)))
    ]
    found = ranks.run(2, both_ways, pairs)[0]
    assert len(found) == 6
    assert all(one == found[0] for one in found)


def both_ways(mesh, pairs):
    return [one for pair in pairs for one in one_after_the_other(mesh, *pair)]


def test_a_run_says_that_it_saves_nothing_where_the_model_is_on_the_host(tiny_model, records, tmp_path):
    short = ("train.steps=1", "train.export=false", "data.eval_path=", "checkpoint.interval=0")
    run = run_command("train", write_config(tmp_path, tiny_model, records), "optimizer.device=cpu", *short)
    assert run.returncode == 0, run.stdout
    told = run.stdout.count("optimizer.device=cpu saves nothing here: the model is on the CPU as well")
    assert told == (0 if torch.cuda.is_available() else 1)
