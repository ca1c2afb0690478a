"""Runs that are asked to stop at any moment: on real ranks, with real signals."""

import contextlib
import os
import signal
import time

import builders
import hooks
import ranks
import torch

from liftdist.engine.criteria.low_rank import LowRank
from liftdist.models import weights
from liftdist.runs import saver
from liftdist.training import objective

PHASES = ("forward", "accumulation", "evaluation", "refresh", "save", "selection", "loading")


class Strike:
    """Rank 1 sends itself a signal, twice, in the middle of a phase."""

    def __init__(self, mesh, phase, number):
        self.mesh, self.phase, self.number = mesh, phase, number
        self.forwards = self.evaluations = 0
        self.struck_in_step = None
        self.hooks = contextlib.ExitStack()

    def hit(self, phase):
        if phase == self.phase and self.struck_in_step is None:
            self.struck_in_step = (self.forwards + 1) // 2  # two micro-batches a step
            if self.mesh.rank == 1:
                os.kill(os.getpid(), self.number)
                os.kill(os.getpid(), self.number)

    def __enter__(self):
        around = self.hooks.enter_context
        around(hooks.around(objective, "token_losses", before=self.in_forward))
        around(hooks.around(LowRank, "scores", before=lambda *_: self.hit("refresh" if self.forwards else "selection")))
        around(hooks.around(saver, "_write_file", before=self.in_save))
        around(hooks.around(weights.ModelFolder, "rows", before=lambda *_: self.hit("loading")))
        return self

    def __exit__(self, *_):
        self.hooks.close()

    def in_forward(self, model, *_):
        if model.training:
            self.forwards += 1
            if self.forwards in (3, 4):
                self.hit("forward" if self.forwards == 3 else "accumulation")
        else:
            self.evaluations += 1
            if self.evaluations == 15:  # inside the second of ten micro-batches
                self.hit("evaluation")

    def in_save(self, *_):
        self.hit("save")
        time.sleep(0.3)


def stopped_in_every_phase(mesh, config, folder):
    config.run_dir = str(folder / "undisturbed")
    assert builders.run_once(mesh, config) == "finished"
    step, expected = builders.files_of(folder / "undisturbed")
    assert step == config.train.steps
    outcomes = {}
    for number, phase in enumerate(PHASES):
        config.run_dir = str(folder / phase)
        config.cache_dir = str(folder / ("other-cache" if phase == "selection" else "cache"))
        with Strike(mesh, phase, (signal.SIGTERM, signal.SIGUSR1)[number % 2]) as strike:
            end = builders.run_once(mesh, config)
        torch.distributed.barrier()
        stopped_at, _ = builders.files_of(folder / phase)
        reason = builders.last_end(folder / phase)["reason"]
        again = builders.run_once(mesh, config)
        same = builders.files_of(folder / phase) == (step, expected)
        outcomes[phase] = (end, strike.struck_in_step, stopped_at, reason, again, same)
    return outcomes


def test_a_run_stops_in_every_phase_and_continues_to_the_bit(tiny_model, tmp_path):
    records = builders.write_records(tmp_path / "records.jsonl")
    config = builders.config(
        tiny_model, records, tmp_path,
        data=dict(eval_path=str(records)),
        selection=dict(refresh_interval=3),
        train=dict(steps=7, batch_size=6, eval_interval=4, export=False),
        checkpoint=dict(interval=2, keep=9),
    )  # fmt: skip
    for outcomes in ranks.run(2, stopped_in_every_phase, config, tmp_path):
        for phase, (end, struck, stopped, reason, again, same) in outcomes.items():
            assert end == f"Stopped: {reason}", phase
            assert reason in ("SIGTERM", "SIGUSR1")
            assert struck is not None, phase
            assert 0 <= stopped - max(struck - 1, 0) <= 2, (phase, struck, stopped)
            assert again == "finished"
            assert same, phase
