"""Put on PYTHONPATH: the rank of ``FAULT=rank:step:kind`` fails when it is about to take that step.

``SLOW=seconds:starts`` makes every step so much longer, in the first starts of a SLURM job.
"""

import os
import signal
import sys
import time
from pathlib import Path

SLOW, _, STARTS = os.environ.get("SLOW", "0").partition(":")
SLOW = float(SLOW) if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(STARTS or 99) else 0.0
RANK, STEP, KIND = (os.environ.get("FAULT", "") + "::").split(":")[:3]


def fail():
    if KIND == "bug":
        raise ZeroDivisionError("a bug in this rank")
    if KIND == "leave":
        os._exit(0)
    if KIND == "exit":
        sys.exit(0)
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "memory" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        import torch

        torch.empty(1 << 50)


def wait_for_the_checkpoint(trainer):
    """Until the checkpoint that was due last is there: it is written in the background, and a restart is to find it."""
    interval = trainer.config.checkpoint.interval
    due = trainer.step // interval * interval if interval else 0
    folder = Path(trainer.config.run_dir).expanduser() / "checkpoints" / f"step-{due:08d}"
    ends = time.monotonic() + 60
    while due and not folder.exists() and time.monotonic() < ends:
        time.sleep(0.01)


class Finder:
    """Patches the trainer while ``liftdist.training.setup`` is imported, which is after it."""

    def find_spec(self, name, path=None, target=None):
        if name == "liftdist.training.setup":
            sys.meta_path.remove(self)
            from liftdist.training import trainer

            run_step = trainer.Trainer.run_step

            def faulty(self):
                time.sleep(SLOW)
                if os.environ.get("RANK") == RANK and self.step + 1 == int(STEP):
                    wait_for_the_checkpoint(self)
                    fail()
                return run_step(self)

            trainer.Trainer.run_step = faulty


if "RANK" in os.environ and (KIND or SLOW):
    sys.meta_path.insert(0, Finder())
