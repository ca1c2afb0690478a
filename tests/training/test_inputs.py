"""The inputs of ranks: each makes its share of the parts, once, whatever caches they have."""

import json
import os
from pathlib import Path

import builders
import hooks
import pytest
import ranks

from liftdist.console import Console
from liftdist.data import parts
from liftdist.runs.context import RunContext
from liftdist.runs.stop import CancellationPoint, StopRequests
from liftdist.training import run

PARTS = 3


def prepare(mesh, config, apart):
    """How many parts this rank has made, and what it was given."""
    made = []
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # no further processes
    if apart:
        config.cache_dir += f"-{mesh.rank}"
    with hooks.around(parts, "write", before=lambda target, *_: made.append(target.name)):
        inputs = run._inputs(RunContext(config, mesh, Console(False), CancellationPoint(StopRequests())))
    return made, len(inputs.samples), inputs.samples.digest, inputs.samples.table[0], inputs.samples.table[-1]


@pytest.mark.parametrize("apart", [False, True], ids=["one cache", "caches of their own"])
@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_ranks_make_all_parts_whatever_caches_they_share(world_size, apart, tiny_model, tmp_path):
    records = tmp_path / "records.jsonl"
    count = (PARTS - 1) * parts.RECORDS + 9
    records.write_text("".join(json.dumps({"prompt": f"{n} is", "completion": f" {n}"}) + "\n" for n in range(count)))
    config = builders.config(tiny_model, records, tmp_path)
    found = ranks.run(world_size, prepare, config, apart)
    assert {str(inputs) for _, *inputs in found} == {str([*found[0][1:]])}
    assert found[0][1] == count
    made = [[int(name.removeprefix("part-")) for name in names] for names, *_ in found]
    for rank, numbers in enumerate(made):
        share = range(rank * PARTS // world_size, (rank + 1) * PARTS // world_size)
        assert not numbers or numbers[0] in share
        assert not apart or sorted(numbers) == [*range(PARTS)]
    if world_size > 1 and not apart:
        assert sum(map(len, made)) < world_size * PARTS
    for cache in Path(tmp_path).glob("cache*"):
        folder = next((cache / "tokens").iterdir())
        assert parts.complete(folder) == set(range(PARTS))
        assert sorted(path.name for path in folder.iterdir())[-1] == "records"
        assert not list(folder.glob(".*"))
