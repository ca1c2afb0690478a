"""Versions of a model that changes in a known way: what is published, by this process or by one that is killed."""

import sys
from pathlib import Path

import torch

from liftdist.models import weights
from liftdist.models.weights import ModelFolder
from liftdist.sync import checkpoints
from liftdist.sync.state import Weights
from liftdist.sync.writer import Stream, Writer

SHARE, REFRESH = 20, 5  # one of so many weights; versions from one support to the next


def stream(model: Path, **other) -> Stream:
    return Stream(**{"id": "one", "run": "mine", "base": weights.digest(model, model / "cache"), "origin": {}, **other})


def writer(folder: Path, base: Path, **settings) -> Writer:
    model = ModelFolder(base)
    of = settings.pop("stream", stream(base))
    return Writer(folder, of, lambda name, indices: checkpoints.read_at(model, name, indices), **settings)


def state(base: Path, step: int) -> dict[str, Weights]:
    """What the run has changed after a step: a function of the step alone, of more weights after each refresh."""
    model, found = ModelFolder(base), {}
    for place, name in enumerate(sorted(name for name in model.file_of if "_proj" in name)):
        info = model.info(name)
        numel = torch.Size(info["shape"]).numel()
        drawn = [
            torch.randperm(numel, generator=torch.Generator().manual_seed(number))[: numel // SHARE]
            for number in range(1 + step // REFRESH)
        ]
        indices = torch.cat(drawn).unique()
        chance = torch.Generator().manual_seed(1000 * step + place)
        values = torch.randn(indices.numel(), generator=chance).bfloat16()
        found[name] = checkpoints.weights_of(model, name, indices, values)
    return found


def whole(base: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the model after a step."""
    model = ModelFolder(base)
    tensors = {name: model.read(name) for name in model.file_of}
    for name, held in state(base, step).items() if step else ():
        tensors[name].view(-1)[held.support.indices.long()] = held.values
    return tensors


def main(folder: str, base: str, last: str) -> None:
    """Publish each step after the newest version's, without pause."""
    with writer(Path(folder), Path(base), keep=4, full_interval=3) as made:
        print("ready", flush=True)
        begin = made.version.step if made.version else 0
        for step in range(begin + 1, int(last) + 1):
            made.publish(step, state(Path(base), step))


if __name__ == "__main__":
    main(*sys.argv[1:])
