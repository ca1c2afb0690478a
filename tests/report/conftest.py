import builders
import commands
import pytest
import ranks

from liftdist import config as configs
from liftdist.evaluation import scores
from liftdist.runs.results import Answer, Results


@pytest.fixture(scope="session")
def reported(tiny_model, tmp_path_factory):
    """A run of eight steps on two ranks with refreshes, four checkpoints and evaluations. Not to be changed."""
    folder = tmp_path_factory.mktemp("reported")
    records = builders.write_records(folder / "records.jsonl")
    path = commands.write_config(
        folder, tiny_model, records, train=dict(steps=8, export=False), checkpoint=dict(interval=2, keep=9)
    )
    assert ranks.run(2, builders.run_once, *configs.load(path)) == ["finished", "finished"]
    return folder / "run"


@pytest.fixture(scope="session")
def with_answers():
    """Writes two evaluations of one task into a run directory: the scores by question of each."""

    def write(run_dir, first, last, task="sums", text="two"):
        written = Results(run_dir)
        for step, found in ((0, first), (8, last)):
            answers = [
                Answer(id, f"1 + {id}? {text}", f"{text} {step}", ["2"], None, score) for id, score in enumerate(found)
            ]
            figure = scores.figure(step, task, "accuracy", answers)
            written.add(figure, answers)
            if step:
                written.add(scores.change(run_dir, figure, answers))
        written.close()

    return write
